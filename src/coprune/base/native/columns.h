// SparseGPT's walk over one block of columns (arXiv 2301.00774): a pruned weight's error goes into the columns after it.
//
// Outputs do not touch each other, so a tile of them stays in the first cache while its columns are walked through. Vectors
// are the compiler's own, so that one source serves every instruction set.
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
    Floats* falls;  // 1 where a weight falls, else 0
    Floats* scores;
    Ints* ranks;
};

// columns[j] −= Σ errors[k] · U[k][j] over first ≤ k < last, in two chains for each vector. unit: U[·][j], contiguous.
inline void bring_up_to_date(const Tile& tile, int64_t j, const float* unit, int64_t first, int64_t last) {
    Floats sums[2][VECTORS] = {};
    int64_t k = first;
    for (; k + 2 <= last; k += 2)
        for (int half = 0; half < 2; half++)
            for (int v = 0; v < VECTORS; v++) sums[half][v] += tile.errors[(k + half) * VECTORS + v] * unit[k + half];
    for (; k < last; k++)
        for (int v = 0; v < VECTORS; v++) sums[0][v] += tile.errors[k * VECTORS + v] * unit[k];
    for (int v = 0; v < VECTORS; v++) tile.columns[j * VECTORS + v] -= sums[0][v] + sums[1][v];
}

// Of every group keep the n of m largest W² / U_jj²; of equals the lower index falls first.
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
    const int32_t fallen = (int32_t)(m - block->n);
    for (int64_t i = 0; i < m; i++)
        for (int v = 0; v < VECTORS; v++) {
            const Ints falls = tile.ranks[i * VECTORS + v] < fallen;
            tile.falls[(first + i) * VECTORS + v] = falls ? Floats{} + 1 : Floats{};
        }
}

// What column j leaves to later ones: the weights that fall.
inline void leave_errors(const Tile& tile, int64_t j) {
    for (int64_t at = j * VECTORS; at < (j + 1) * VECTORS; at++) tile.errors[at] = tile.columns[at] * tile.falls[at];
}

inline void load(const Tile& tile, const ColumnBlock* block, int64_t first, int64_t count) {
    for (int64_t j = 0; j < block->size; j++) {
        float* columns = (float*)(tile.columns + j * VECTORS);
        float* falls = (float*)(tile.falls + j * VECTORS);
        for (int64_t r = 0; r < TILE; r++) columns[r] = r < count ? block->columns[j * block->outputs + first + r] : 0;
        if (!block->m)
            for (int64_t r = 0; r < TILE; r++) falls[r] = r < count ? !block->keep[j * block->outputs + first + r] : 0;
    }
}

inline void store(const Tile& tile, const ColumnBlock* block, int64_t first, int64_t count) {
    for (int64_t j = 0; j < block->size; j++) {
        const int64_t at = j * block->outputs + first;
        const float* columns = (const float*)(tile.columns + j * VECTORS);
        const float* errors = (const float*)(tile.errors + j * VECTORS);
        const float* falls = (const float*)(tile.falls + j * VECTORS);
        for (int64_t r = 0; r < count; r++) {
            block->columns[at + r] = falls[r] != 0 ? 0 : columns[r];
            block->errors[at + r] = errors[r];
            block->keep[at + r] = falls[r] == 0;
        }
    }
}

// Walk through the columns for outputs first … last − 1. unit: U transposed, size × size. Returns whether memory sufficed.
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
            for (int64_t j = start; j < end; j++) bring_up_to_date(tile, j, unit + j * size, 0, start);
            if (block->m) choose(tile, start, block);
            for (int64_t j = start; j < end; j++) {
                bring_up_to_date(tile, j, unit + j * size, start, j);
                leave_errors(tile, j);
            }
        }
        store(tile, block, output, count);
    }
    free(memory);
    return true;
}

}  // namespace
