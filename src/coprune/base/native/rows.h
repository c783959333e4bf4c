// The loop that all vector kernels share: R rows against B inputs, 64 columns of mask at a time.
//
// `Vector` supplies the instruction set:
//   Input, Sum              register types of LANES inputs and of partial sums
//   LANES                   columns per step, a divisor of 64
//   load(x), load(x, count) LANES inputs, or the first `count` of them and zeros
//   expand(bits, values)    the next values, in the lanes whose bits are set (only the LANES lowest bits count)
//   multiply_add, zero, total          on partial sums; `total` is the horizontal sum
//   AHEAD                   how many bytes ahead the values are fetched
//   REGISTERS               how many vector registers there are
// B inputs share the expansion, and R rows share the loads of x. The rows of a group lie far apart, so that each reads
// its values and mask strictly in order, across the ends of rows too, which is what prefetching follows best: four
// neighbouring rows at once reached a third of the memory's bandwidth. SETS of sums per row keep the multipliers busy.
#pragma once
#include "packed.h"

namespace {

// 64 columns of R rows, `apart` bits from each other. WHOLE: all of them exist; else `count` do. BYTES: rows begin at whole bytes of the mask.
template <class Vector, int R, int SETS, int B, bool WHOLE, bool BYTES>
__attribute__((always_inline)) inline void block(
    const Matrix* matrix, int64_t bit, int64_t apart, typename Vector::Sum (&sums)[R][SETS][B],
    const typename Vector::Value* (&values)[R], const typename Vector::Value* x, int64_t count, int first_set) {
    constexpr int LANES = Vector::LANES, STEPS = 64 / LANES;
    uint64_t words[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        words[r] = BYTES ? load_64(matrix->mask + (bit >> 3) + r * (apart >> 3))
                         : mask_word(matrix->mask, bit + r * apart);
        if (!WHOLE) words[r] &= low_bits(count);
        __builtin_prefetch((const char*)values[r] + Vector::AHEAD);
        __builtin_prefetch((const char*)values[r] + Vector::AHEAD + 64);
    }
#pragma GCC unroll 8
    for (int step = 0; step < STEPS; step++) {
        const int64_t left = WHOLE ? LANES : count - step * LANES;
        typename Vector::Input inputs[B];
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
            const typename Vector::Value* at = x + b * matrix->columns + step * LANES;
            inputs[b] = left >= LANES ? Vector::load(at) : Vector::load(at, left > 0 ? (int)left : 0);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            // Counted from the whole word each time: shorter chains than one addition after the other.
            const int before = __builtin_popcountll(step == 0 ? 0 : words[r] << (64 - step * LANES));
            uint64_t bits = words[r] >> (step * LANES);
            asm("" : "+r"(bits));  // else some compilers keep it in mask registers, and moving it back is slow
            const auto weights = Vector::expand((uint32_t)bits, values[r] + before);
            typename Vector::Sum(&set)[B] = sums[r][(first_set + step) % SETS];
#pragma GCC unroll 8
            for (int b = 0; b < B; b++) set[b] = Vector::multiply_add(weights, inputs[b], set[b]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) values[r] += __builtin_popcountll(words[r]);
}

// Rows row, row + gap, …
template <class Vector, int R, int B, bool BYTES>
void rows_by_inputs(
    const Matrix* matrix, const typename Vector::Value* x, typename Vector::Value* y, int64_t row, int64_t gap) {
    constexpr int SETS = R * B == 1 ? 4 : R * B <= 3 ? 2 : 1, STEPS = 64 / Vector::LANES;
    constexpr int BLOCKS = STEPS < SETS ? SETS / STEPS : 1;  // so many in turn use every set
    const int64_t columns = matrix->columns, bit = row * columns, apart = gap * columns;
    typename Vector::Sum sums[R][SETS][B];
    const typename Vector::Value* values[R];
    for (int r = 0; r < R; r++) {
        values[r] = (const typename Vector::Value*)matrix->values + matrix->starts[row + r * gap];
        for (int set = 0; set < SETS; set++)
            for (int b = 0; b < B; b++) sums[r][set][b] = Vector::zero();
    }
    int64_t column = 0;
    for (; column + 64 * BLOCKS <= columns; column += 64 * BLOCKS)
#pragma GCC unroll 4
        for (int i = 0; i < BLOCKS; i++)
            block<Vector, R, SETS, B, true, BYTES>(
                matrix, bit + column + 64 * i, apart, sums, values, x + column + 64 * i, 64, i * STEPS);
    for (; column + 64 <= columns; column += 64)
        block<Vector, R, SETS, B, true, BYTES>(matrix, bit + column, apart, sums, values, x + column, 64, 0);
    if (column < columns)
        block<Vector, R, SETS, B, false, BYTES>(matrix, bit + column, apart, sums, values, x + column, columns - column, 0);
    for (int r = 0; r < R; r++) {
        for (int b = 0; b < B; b++) {
            float sum = 0;
            for (int set = 0; set < SETS; set++) sum += Vector::total(sums[r][set][b]);
            store_output(matrix, y + b * matrix->rows, row + r * gap, sum);
        }
    }
}

// Rows first … last − 1 against B inputs, R rows at a time.
template <class Vector, int R, int B, bool BYTES>
void rows_in_groups(
    const Matrix* matrix, const typename Vector::Value* x, typename Vector::Value* y, int64_t first, int64_t last) {
    const int64_t gap = (last - first) / R;
    for (int64_t row = first; row < first + gap; row++) rows_by_inputs<Vector, R, B, BYTES>(matrix, x, y, row, gap);
    for (int64_t row = first + R * gap; row < last; row++) rows_by_inputs<Vector, 1, B, BYTES>(matrix, x, y, row, 1);
}

template <class Vector, int B, bool BYTES>
void rows_by(const Matrix* matrix, const typename Vector::Value* x, typename Vector::Value* y, int64_t first, int64_t last) {
    constexpr int R = B <= 2 ? 2 : Vector::REGISTERS < 32 ? 1 : B == 4 ? 4 : 2;
    // Inputs that fill the first cache come from the second one for every group: then larger groups.
    const bool wide = B * matrix->columns * sizeof(*x) > 16 << 10;
    if (B <= 2 && Vector::REGISTERS == 32 && wide) rows_in_groups<Vector, B <= 2 ? 3 : R, B, BYTES>(matrix, x, y, first, last);
    else rows_in_groups<Vector, R, B, BYTES>(matrix, x, y, first, last);
}

template <class Vector, bool BYTES>
void multiply_tiles(const Matrix* matrix, const void* x_pointer, void* y_pointer, int64_t batch, int64_t first, int64_t last) {
    // What is multiplied in several rounds: a few rows at a time for all inputs, so that they come from memory once.
    constexpr int64_t LARGEST = Vector::REGISTERS < 32 ? 4 : 8;
    const bool one_round = batch <= LARGEST && (batch & (batch - 1)) == 0;
    const int64_t tile = one_round ? last - first : 16;
    for (int64_t start = first; start < last; start += tile) {
        const int64_t end = start + tile < last ? start + tile : last;
        int64_t b = 0;
        while (b < batch) {
            const typename Vector::Value* x = (const typename Vector::Value*)x_pointer + b * matrix->columns;
            typename Vector::Value* y = (typename Vector::Value*)y_pointer + b * matrix->rows;
            if (batch - b >= 8 && LARGEST == 8) b += 8, rows_by<Vector, 8, BYTES>(matrix, x, y, start, end);
            else if (batch - b >= 4) b += 4, rows_by<Vector, 4, BYTES>(matrix, x, y, start, end);
            else if (batch - b >= 2) b += 2, rows_by<Vector, 2, BYTES>(matrix, x, y, start, end);
            else b += 1, rows_by<Vector, 1, BYTES>(matrix, x, y, start, end);
        }
    }
}

template <class Vector>
void multiply_rows(const Matrix* matrix, const void* x, void* y, int64_t batch, int64_t first, int64_t last) {
    if (matrix->columns % 8 == 0) multiply_tiles<Vector, true>(matrix, x, y, batch, first, last);
    else multiply_tiles<Vector, false>(matrix, x, y, batch, first, last);
}

// The dense product with the same loads and sums, and nothing to expand.
template <class Vector>
void dense_rows(const Matrix* matrix, const void* x_pointer, void* y_pointer, int64_t batch, int64_t first, int64_t last) {
    constexpr int R = 4, LANES = Vector::LANES;
    typedef typename Vector::Value Value;
    const int64_t columns = matrix->columns, whole = columns / LANES * LANES;
    for (int64_t row = first; row < last; row += R) {
        for (int64_t b = 0; b < batch; b++) {
            const Value* x = (const Value*)x_pointer + b * columns;
            const Value* weights[R];
            typename Vector::Sum sums[R];
            for (int r = 0; r < R; r++) {
                weights[r] = (const Value*)matrix->values + (row + r < last ? row + r : last - 1) * columns;
                sums[r] = Vector::zero();
            }
            for (int64_t column = 0; column < whole; column += LANES) {
                const auto input = Vector::load(x + column);
                for (int r = 0; r < R; r++)
                    sums[r] = Vector::multiply_add(Vector::load(weights[r] + column), input, sums[r]);
            }
            if (whole < columns) {
                const auto input = Vector::load(x + whole, (int)(columns - whole));
                for (int r = 0; r < R; r++)
                    sums[r] = Vector::multiply_add(
                        Vector::load(weights[r] + whole, (int)(columns - whole)), input, sums[r]);
            }
            for (int r = 0; r < R && row + r < last; r++)
                store_output(matrix, (Value*)y_pointer + b * matrix->rows, row + r, Vector::total(sums[r]));
        }
    }
}

}  // namespace
