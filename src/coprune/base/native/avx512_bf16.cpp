// AVX-512 with BF16 (Zen 4, Cooper and Sapphire Rapids and later), whose vdpbf16ps multiplies pairs and sums in float32
// (subnormals count as zero).
#include "columns.h"
#include "gram.h"

const SolvingKernels avx512_bf16_solving = {update_columns, gram_rearrange, gram_multiply};
