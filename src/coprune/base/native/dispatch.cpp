// The C interface that Python calls: chooses the instruction set once, and shares the rows among threads.
//
// Threads come from the OpenMP runtime that PyTorch has already started: Python passes the address of its
// GOMP_parallel, so there is no second pool that would compete for the cores.
#include <stdlib.h>

#include "packed.h"
#include "solving.h"

namespace {

enum Level { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AVX512_VBMI2 = 3 };

int detect() {
#ifdef COPRUNE_X86
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
    if (avx512 && avx2 && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16"))
        return AVX512_VBMI2;
    if (avx512 && avx2) return AVX512;
    if (avx2) return AVX2;
#endif
    return PORTABLE;
}

int level = detect();

Kernels chosen() {
    Kernels kernels = portable_kernels;
#ifdef COPRUNE_X86
    const Kernels* all[] = {&portable_kernels, &avx2_kernels, &avx512_kernels, &avx512_vbmi2_kernels};
    kernels = *all[level];
#endif
    if (!kernels.expand_2_bytes) kernels.expand_2_bytes = portable_kernels.expand_2_bytes;
    return kernels;
}

SolvingKernels chosen_solving() {
#ifdef COPRUNE_X86
    const SolvingKernels* all[] = {&portable_solving, &avx2_solving, &avx512_solving, &avx512_vbmi2_solving};
    return *all[level];
#else
    return portable_solving;
#endif
}

Kernels kernels = chosen();
SolvingKernels solving = chosen_solving();

typedef void (*Parallel)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
Parallel parallel = nullptr;

struct Work {
    MultiplyRows multiply;
    ExpandRows expand;
    const Matrix* matrix;
    const void* x;
    void* y;
    int64_t batch, first, last, chunk, next;
    int64_t bytes;  // of one dense element, for expand
};

void take_rows(void* data) {
    Work* work = (Work*)data;
    for (;;) {
        const int64_t first = __atomic_fetch_add(&work->next, work->chunk, __ATOMIC_RELAXED);
        if (first >= work->last) return;
        const int64_t last = first + work->chunk < work->last ? first + work->chunk : work->last;
        if (work->multiply) {
            work->multiply(work->matrix, work->x, work->y, work->batch, first, last);
        } else {
            char* y = (char*)work->y + (first - work->first) * work->matrix->columns * work->bytes;
            work->expand(work->matrix, y, first, last);
        }
    }
}

void share(Work* work, int threads) {
    const int64_t rows = work->last - work->first;
    // Below some thousand weights a thread costs more than it saves.
    const int64_t useful = rows * work->matrix->columns / 32768 + 1;
    if (threads > useful) threads = (int)useful;
    work->next = work->first;
    if (threads <= 1 || !parallel) {
        work->chunk = rows;
        take_rows(work);
        return;
    }
    // Several chunks a thread, since another process may hold a core; multiples of 16 rows, as the kernels' tiles.
    work->chunk = (rows / (threads * 8) + 15) / 16 * 16;
    if (work->chunk < 16) work->chunk = 16;
    parallel(take_rows, work, (unsigned)threads, 0);
}

// Work on pieces 0 … count − 1, which threads take one after another, from the last to the first.
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

constexpr int64_t WORDS = 1 << 17;  // of one piece

struct ReadPieces : Pieces {
    const uint64_t* words;
    int64_t count;
    uint64_t sum;
};

void read_piece(Pieces* pieces, int64_t piece) {
    ReadPieces* own = (ReadPieces*)pieces;
    const int64_t first = piece * WORDS, count = own->count - first < WORDS ? own->count - first : WORDS;
    __atomic_fetch_add(&own->sum, kernels.read_words(own->words + first, count), __ATOMIC_RELAXED);
}

constexpr int64_t OUTPUTS = 64;  // of one piece of a block of columns; a multiple of what is walked through together

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
    kernels = chosen();
    solving = chosen_solving();
    return level;
}

void coprune_set_parallel(void* gomp_parallel) { parallel = (Parallel)gomp_parallel; }

// starts[r]: ones before row r; starts has rows + 1 entries. Returns the number of ones.
int64_t coprune_count(const uint8_t* mask, int64_t rows, int64_t columns, int64_t* starts) {
    int64_t total = 0;
    for (int64_t row = 0; row < rows; row++) {
        starts[row] = total;
        for (int64_t column = 0; column < columns; column += 64)
            total += __builtin_popcountll(mask_word(mask, row * columns + column) & low_bits(columns - column));
    }
    return starts[rows] = total;
}

// bytes: 4 for float32, 2 for bfloat16. dense: not 0 if `values` holds the whole matrix.
void coprune_multiply(
    const Matrix* matrix, int bytes, int dense, const void* x, void* y, int64_t batch, int threads) {
    const MultiplyRows packed = bytes == 4 ? kernels.multiply_float32 : kernels.multiply_bfloat16;
    const MultiplyRows plain = bytes == 4 ? kernels.dense_float32 : kernels.dense_bfloat16;
    Work work = {dense ? plain : packed, nullptr, matrix, x, y, batch, 0, matrix->rows, 0, 0, bytes};
    share(&work, threads);
}

// Write rows first … last − 1 as dense elements of 2 or 4 bytes.
void coprune_expand(const Matrix* matrix, int bytes, void* dense, int64_t first, int64_t last, int threads) {
    const ExpandRows expand = bytes == 4 ? kernels.expand_4_bytes : kernels.expand_2_bytes;
    Work work = {nullptr, expand, matrix, nullptr, dense, 0, first, last, 0, 0, bytes};
    share(&work, threads);
}

// Read count words, to measure the memory's bandwidth. Returns their sum, so that reading them cannot be left out.
uint64_t coprune_read(const uint64_t* words, int64_t count, int threads) {
    ReadPieces pieces = {{read_piece, 0}, words, count, 0};
    share_pieces(&pieces, (count + WORDS - 1) / WORDS, threads);
    return pieces.sum;
}

// Returns 0, or 1 where memory does not suffice.
int coprune_update_columns(const ColumnBlock* block, int threads) {
    const int64_t size = block->size;
    // Transposed, since the walk takes U column by column.
    float* unit = (float*)malloc(size * size * sizeof(float));
    if (!unit) return 1;
    for (int64_t k = 0; k < size; k++)
        for (int64_t j = k; j < size; j++) unit[j * size + k] = block->unit[k * block->down + j * block->right];
    ColumnPieces pieces = {{update_piece, 0}, block, unit, 0};
    share_pieces(&pieces, (block->outputs + OUTPUTS - 1) / OUTPUTS, threads);
    free(unit);
    return pieces.failed;
}

// How many words of scratch coprune_gram needs; 0 where the processor has no products of bfloat16.
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
