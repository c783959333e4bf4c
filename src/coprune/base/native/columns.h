// SparseGPT's update of one block of columns (arXiv 2301.00774): a pruned weight's error is compensated in later columns.
//
// Outputs are independent, so a tile of them stays in the L1 cache for all columns. The compiler's vector extensions let one
// source serve every instruction set.
#pragma once
#include <stdlib.h>

#include "solving.h"

namespace {

constexpr int LANES = 16, VECTORS = 2, TILE = LANES * VECTORS;  // outputs of a tile: enough sums to hide their latency
typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));

struct Tile {
    Floats* columns;  // size × VECTORS each
    Floats* errors;
    Floats* pruned;  // 1 where a weight is pruned, else 0
    Floats* scores;
    Ints* ranks;
};

// columns[j] −= Σ errors[k] · U[k][j] over first ≤ k < last, in two chains for each vector. unit: U[·][j], contiguous.
inline void apply_errors(const Tile& tile, int64_t j, const float* unit, int64_t first, int64_t last) {
    Floats sums[2][VECTORS] = {};
    int64_t k = first;
    for (; k + 2 <= last; k += 2)
        for (int half = 0; half < 2; half++)
            for (int v = 0; v < VECTORS; v++) sums[half][v] += tile.errors[(k + half) * VECTORS + v] * unit[k + half];
    for (; k < last; k++)
        for (int v = 0; v < VECTORS; v++) sums[0][v] += tile.errors[k * VECTORS + v] * unit[k];
    for (int v = 0; v < VECTORS; v++) tile.columns[j * VECTORS + v] -= sums[0][v] + sums[1][v];
}

// Keep the n weights of m with the largest W² / U_jj²; of equal ones the lower index is pruned first.
inline void choose(const Tile& tile, int64_t first, const ColumnBlock* block) {
    const int64_t m = block->m;
    for (int64_t i = 0; i < m; i++) {
        for (int v = 0; v < VECTORS; v++) {
            const Floats ratio = tile.columns[(first + i) * VECTORS + v] / block->pivots[first + i];
            tile.scores[i * VECTORS + v] = ratio * ratio;
            tile.ranks[i * VECTORS + v] = Ints{};
        }
    }
    for (int64_t j = 1; j < m; j++) {
        for (int64_t i = 0; i < j; i++) {
            for (int v = 0; v < VECTORS; v++) {
                const Ints above = tile.scores[i * VECTORS + v] <= tile.scores[j * VECTORS + v];  // −1 where true
                tile.ranks[j * VECTORS + v] -= above;
                tile.ranks[i * VECTORS + v] += 1 + above;
            }
        }
    }
    const int32_t count = (int32_t)(m - block->n);
    for (int64_t i = 0; i < m; i++)
        for (int v = 0; v < VECTORS; v++) {
            const Ints pruned = tile.ranks[i * VECTORS + v] < count;
            tile.pruned[(first + i) * VECTORS + v] = pruned ? Floats{} + 1 : Floats{};
        }
}

// The errors of column j are its pruned weights.
inline void set_errors(const Tile& tile, int64_t j) {
    for (int64_t at = j * VECTORS; at < (j + 1) * VECTORS; at++) tile.errors[at] = tile.columns[at] * tile.pruned[at];
}

inline void load(const Tile& tile, const ColumnBlock* block, int64_t first, int64_t count) {
    for (int64_t j = 0; j < block->size; j++) {
        float* columns = (float*)(tile.columns + j * VECTORS);
        float* pruned = (float*)(tile.pruned + j * VECTORS);
        for (int64_t r = 0; r < TILE; r++) columns[r] = r < count ? block->columns[j * block->outputs + first + r] : 0;
        if (!block->m)
            for (int64_t r = 0; r < TILE; r++) pruned[r] = r < count ? !block->keep[j * block->outputs + first + r] : 0;
    }
}

inline void store(const Tile& tile, const ColumnBlock* block, int64_t first, int64_t count) {
    for (int64_t j = 0; j < block->size; j++) {
        const int64_t at = j * block->outputs + first;
        const float* columns = (const float*)(tile.columns + j * VECTORS);
        const float* errors = (const float*)(tile.errors + j * VECTORS);
        const float* pruned = (const float*)(tile.pruned + j * VECTORS);
        for (int64_t r = 0; r < count; r++) {
            block->columns[at + r] = pruned[r] != 0 ? 0 : columns[r];
            block->errors[at + r] = errors[r];
            block->keep[at + r] = pruned[r] == 0;
        }
    }
}

// Update the columns for outputs first … last − 1. unit: U transposed, size × size. Returns false if memory runs out.
inline bool update_columns(const ColumnBlock* block, const float* unit, int64_t first, int64_t last) {
    const int64_t size = block->size, group = block->m ? block->m : 1;
    Floats* memory = nullptr;
    if (posix_memalign((void**)&memory, sizeof(Floats), 5 * size * VECTORS * sizeof(Floats))) return false;
    const int64_t part = size * VECTORS;
    const Tile tile = {memory,
                       memory + part,
                       memory + 2 * part,
                       memory + 3 * part,
                       (Ints*)(memory + 4 * part)};
    for (int64_t output = first; output < last; output += TILE) {
        const int64_t count = last - output < TILE ? last - output : TILE;
        load(tile, block, output, count);
        for (int64_t start = 0; start < size; start += group) {
            const int64_t end = start + group < size ? start + group : size;
            for (int64_t j = start; j < end; j++) apply_errors(tile, j, unit + j * size, 0, start);
            if (block->m) choose(tile, start, block);
            for (int64_t j = start; j < end; j++) {
                apply_errors(tile, j, unit + j * size, start, j);
                set_errors(tile, j);
            }
        }
        store(tile, block, output, count);
    }
    free(memory);
    return true;
}

}  // namespace
