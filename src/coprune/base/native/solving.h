// What statistics and solvers leave to native code: the walk over a block of columns, and Gram matrices of bfloat16.
#pragma once
#include <stdint.h>

// One block of SparseGPT's columns; columns, keep and errors are size × outputs and written in place.
struct ColumnBlock {
    float* columns;
    uint8_t* keep;  // given, if m is 0
    float* errors;
    const float* unit;  // size × size of U, ones on the diagonal
    const float* pivots;
    int64_t size;
    int64_t outputs;
    int64_t down;  // strides of unit
    int64_t right;
    int64_t n;  // of every m columns n are kept; m is 0 for a mask that is given, else it divides size
    int64_t m;
};

typedef bool (*UpdateColumns)(const ColumnBlock* block, const float* unit, int64_t first, int64_t last);

// Tokens of bfloat16 inputs, of which XᵀX is added to a float32 Gram matrix (width × width). Of its panels of `panel` rows
// only what lies on the diagonal and right of it is touched.
struct Tokens {
    const uint16_t* x;
    uint32_t* pairs;  // scratch, as much as coprune_gram_scratch says
    float* gram;
    int64_t tokens;
    int64_t width;
    int64_t stride;  // of x, in elements
    int64_t panel;
};

constexpr int64_t GRAM_BLOCK = 64;  // columns of the Gram matrix that are done together

// Two steps, each for some blocks of GRAM_BLOCK columns: rearrange x, then multiply.
typedef void (*GramStep)(const Tokens* tokens, int64_t first, int64_t last);

struct SolvingKernels {
    UpdateColumns update_columns;
    GramStep gram_rearrange;  // null where the processor has no products of bfloat16
    GramStep gram_multiply;
};

extern const SolvingKernels portable_solving;
#ifdef COPRUNE_X86
extern const SolvingKernels avx2_solving;
extern const SolvingKernels avx512_solving;
extern const SolvingKernels avx512_bf16_solving;
#endif
