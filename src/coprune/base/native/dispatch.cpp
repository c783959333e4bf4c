// The C interface for Python: chooses the instruction set once, and divides the work among threads.
//
// Threads come from the OpenMP runtime that PyTorch has already started: Python passes the address of its
// GOMP_parallel, so there is no second pool that would compete for the cores.
#include <stdlib.h>

#include "solving.h"

namespace {

enum Level { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AVX512_BF16 = 3 };

int detect() {
#ifdef COPRUNE_X86
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
    if (avx512 && avx2 && __builtin_cpu_supports("avx512bf16")) return AVX512_BF16;
    if (avx512 && avx2) return AVX512;
    if (avx2) return AVX2;
#endif
    return PORTABLE;
}

int level = detect();

SolvingKernels chosen() {
#ifdef COPRUNE_X86
    const SolvingKernels* all[] = {&portable_solving, &avx2_solving, &avx512_solving, &avx512_bf16_solving};
    return *all[level];
#else
    return portable_solving;
#endif
}

SolvingKernels solving = chosen();

typedef void (*Parallel)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
Parallel parallel = nullptr;

// Pieces 0 … count − 1 of work; idle threads take the next one, from the last to the first.
struct Pieces {
    void (*work)(Pieces* pieces, int64_t piece);
    int64_t left;
};

void take_pieces(void* data) {
    Pieces* pieces = (Pieces*)data;
    for (;;) {
        const int64_t piece = __atomic_sub_fetch(&pieces->left, 1, __ATOMIC_RELAXED);
        if (piece < 0) return;
        pieces->work(pieces, piece);
    }
}

void share_pieces(Pieces* pieces, int64_t count, int threads) {
    pieces->left = count;
    if (threads > count) threads = (int)count;
    if (threads > 1 && parallel) parallel(take_pieces, pieces, (unsigned)threads, 0);
    else take_pieces(pieces);
}

constexpr int64_t OUTPUTS = 64;  // outputs per piece of a block of columns; a multiple of TILE

struct ColumnPieces : Pieces {
    const ColumnBlock* block;
    const float* unit;
    int failed;
};

void update_piece(Pieces* pieces, int64_t piece) {
    ColumnPieces* own = (ColumnPieces*)pieces;
    const int64_t first = piece * OUTPUTS, end = first + OUTPUTS;
    const int64_t last = end < own->block->outputs ? end : own->block->outputs;
    if (!solving.update_columns(own->block, own->unit, first, last)) __atomic_store_n(&own->failed, 1, __ATOMIC_RELAXED);
}

struct GramPieces : Pieces {
    const Tokens* tokens;
    GramStep step;
};

void gram_piece(Pieces* pieces, int64_t piece) {
    const GramPieces* own = (const GramPieces*)pieces;
    own->step(own->tokens, piece, piece + 1);
}

}  // namespace

extern "C" {

int coprune_level() { return level; }

// Use a lower instruction set than the processor has (for tests). Returns the one in use.
int coprune_set_level(int wanted) {
    const int best = detect();
    level = wanted < best ? wanted : best;
    solving = chosen();
    return level;
}

void coprune_set_parallel(void* gomp_parallel) { parallel = (Parallel)gomp_parallel; }

// Returns 0, or 1 if memory runs out.
int coprune_update_columns(const ColumnBlock* block, int threads) {
    const int64_t size = block->size;
    // Transposed, since U is read column by column.
    float* unit = (float*)malloc(size * size * sizeof(float));
    if (!unit) return 1;
    for (int64_t k = 0; k < size; k++)
        for (int64_t j = k; j < size; j++) unit[j * size + k] = block->unit[k * block->down + j * block->right];
    ColumnPieces pieces = {{update_piece, 0}, block, unit, 0};
    share_pieces(&pieces, (block->outputs + OUTPUTS - 1) / OUTPUTS, threads);
    free(unit);
    return pieces.failed;
}

// Returns the words of scratch that coprune_gram needs; 0 if the processor cannot multiply bfloat16.
int64_t coprune_gram_scratch(int64_t tokens, int64_t width) {
    return solving.gram_multiply ? (width + GRAM_BLOCK - 1) / GRAM_BLOCK * GRAM_BLOCK * ((tokens + 1) / 2) : 0;
}

void coprune_gram(const Tokens* tokens, int threads) {
    const int64_t blocks = (tokens->width + GRAM_BLOCK - 1) / GRAM_BLOCK;
    const GramStep steps[] = {solving.gram_rearrange, solving.gram_multiply};
    for (const GramStep step : steps) {
        GramPieces pieces = {{gram_piece, 0}, tokens, step};
        share_pieces(&pieces, blocks, threads);
    }
}
}  // extern "C"
