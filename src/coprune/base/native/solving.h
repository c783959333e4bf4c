// The native part of statistics and solvers: the update of a block of columns, and Gram matrices of bfloat16 inputs.
#pragma once
#include <stdint.h>

// One block of SparseGPT's columns; columns, keep and errors are size × outputs and written in place.
struct ColumnBlock {
    float* columns;
    uint8_t* keep;  // input if m is 0, else output
    float* errors;
    const float* unit;  // size × size of U, ones on the diagonal
    const float* pivots;
    int64_t size;
    int64_t outputs;
    int64_t down;  // strides of unit
    int64_t right;
    int64_t n;  // n of every m columns are kept; m is 0 if the mask is given, else it divides size
    int64_t m;
};

typedef bool (*UpdateColumns)(const ColumnBlock* block, const float* unit, int64_t first, int64_t last);

// bfloat16 inputs X whose XᵀX is added to a float32 Gram matrix (width × width). Of each panel of `panel` rows only the part
// on and right of the diagonal is written.
struct Tokens {
    const uint16_t* x;
    uint32_t* pairs;  // scratch of coprune_gram_scratch words
    float* gram;
    int64_t tokens;
    int64_t width;
    int64_t stride;  // of x, in elements
    int64_t panel;
};

constexpr int64_t GRAM_BLOCK = 64;  // columns of the Gram matrix computed together

// Two steps, each for some blocks of GRAM_BLOCK columns: rearrange x, then multiply.
typedef void (*GramStep)(const Tokens* tokens, int64_t first, int64_t last);

struct SolvingKernels {
    UpdateColumns update_columns;
    GramStep gram_rearrange;  // null if the processor cannot multiply bfloat16
    GramStep gram_multiply;
};

extern const SolvingKernels portable_solving;
#ifdef COPRUNE_X86
extern const SolvingKernels avx2_solving;
extern const SolvingKernels avx512_solving;
extern const SolvingKernels avx512_bf16_solving;
#endif
