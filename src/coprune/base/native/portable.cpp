// Plain C++, for every processor.
#include "columns.h"

const SolvingKernels portable_solving = {update_columns, nullptr, nullptr};
