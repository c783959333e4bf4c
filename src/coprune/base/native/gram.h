// XᵀX of bfloat16 inputs with vdpbf16ps: the products are exact, the sums are float32 (subnormals count as zero).
//
// The instruction multiplies pairs, here of consecutive tokens, so x is rearranged first: for every block of 64 columns and
// every pair of tokens, 64 words with a column's two values. Then 6 × 64 entries of the Gram matrix stay in registers for all
// pairs. A batch is summed from zero before it is added to the larger totals, for precision.
#pragma once
#include <immintrin.h>

#include "solving.h"

namespace {

constexpr int GRAM_ROWS = 6, GRAM_VECTORS = GRAM_BLOCK / 16;

inline int64_t pairs_of(const Tokens* t) { return (t->tokens + 1) / 2; }

inline __mmask32 first_lanes(int64_t count) { return count >= 32 ? ~0u : count > 0 ? (1u << count) - 1 : 0; }

inline void gram_rearrange(const Tokens* t, int64_t first, int64_t last) {
    alignas(64) uint16_t order[2][32];
    for (int i = 0; i < 32; i++)
        for (int half = 0; half < 2; half++) order[half][i] = (uint16_t)(i / 2 + 16 * half + (i & 1 ? 32 : 0));
    const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
    for (int64_t column = first * GRAM_BLOCK; column < last * GRAM_BLOCK; column += 32) {
        const __mmask32 lanes = first_lanes(t->width - column);
        uint32_t* to = t->pairs + column / GRAM_BLOCK * pairs_of(t) * GRAM_BLOCK + column % GRAM_BLOCK;
        for (int64_t token = 0; token < t->tokens; token += 2, to += GRAM_BLOCK) {
            const uint16_t* from = t->x + token * t->stride + column;
            const __m512i one = _mm512_maskz_loadu_epi16(lanes, from);
            const __m512i two = _mm512_maskz_loadu_epi16(token + 1 < t->tokens ? lanes : 0, from + t->stride);
            _mm512_storeu_si512(to, _mm512_permutex2var_epi16(one, low, two));
            _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(one, high, two));
        }
    }
}

// Rows row … row + ROWS − 1 of the Gram matrix, at the block of columns.
template <int ROWS>
inline void gram_tile(const Tokens* t, int64_t row, int64_t block) {
    const int64_t all = pairs_of(t) * GRAM_BLOCK;
    const uint32_t* right = t->pairs + block * all;
    const uint32_t* left[ROWS];
    for (int r = 0; r < ROWS; r++) left[r] = t->pairs + (row + r) / GRAM_BLOCK * all + (row + r) % GRAM_BLOCK;
    __m512 sums[ROWS][GRAM_VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < GRAM_VECTORS; v++) sums[r][v] = _mm512_setzero_ps();
    for (int64_t at = 0; at < all; at += GRAM_BLOCK) {
        __m512i columns[GRAM_VECTORS];
        for (int v = 0; v < GRAM_VECTORS; v++) columns[v] = _mm512_loadu_si512(right + at + 16 * v);
        for (int r = 0; r < ROWS; r++) {
            const __m512i both = _mm512_set1_epi32((int)left[r][at]);
            for (int v = 0; v < GRAM_VECTORS; v++)
                sums[r][v] = _mm512_dpbf16_ps(sums[r][v], (__m512bh)both, (__m512bh)columns[v]);
        }
    }
    for (int v = 0; v < GRAM_VECTORS; v++) {
        const int64_t column = block * GRAM_BLOCK + 16 * v;
        const __mmask16 lanes = (__mmask16)first_lanes(t->width - column);
        for (int r = 0; r < ROWS; r++) {
            float* to = t->gram + (row + r) * t->width + column;
            _mm512_mask_storeu_ps(to, lanes, _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, to), sums[r][v]));
        }
    }
}

inline void gram_multiply(const Tokens* t, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; block++) {
        const int64_t end = (block * GRAM_BLOCK / t->panel + 1) * t->panel;
        const int64_t rows = end < t->width ? end : t->width;
        int64_t row = 0;
        for (; row + GRAM_ROWS <= rows; row += GRAM_ROWS) gram_tile<GRAM_ROWS>(t, row, block);
        for (; row < rows; row++) gram_tile<1>(t, row, block);
    }
}

}  // namespace
