// The compiler's own vectors, as AVX2.
#include "columns.h"

const SolvingKernels avx2_solving = {update_columns, nullptr, nullptr};
