// The compiler's own vectors, as AVX-512.
#include "columns.h"

const SolvingKernels avx512_solving = {update_columns, nullptr, nullptr};
