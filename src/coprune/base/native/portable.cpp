// Plain C++: walks the ones of the mask. Correct everywhere; used where no vector kernel fits.
#include "packed.h"
#include "columns.h"

namespace {

// Whether no input is infinite or NaN: only such make a difference where a weight is pruned, for 0 times them is NaN.
template <typename T>
bool all_finite(const T* x, int64_t count) {
    float sum = 0;
    for (int64_t i = 0; i < count; i++) sum += 0 * to_float(x[i]);
    return sum == 0;
}

template <typename T>
void multiply(const Matrix* matrix, const void* x_pointer, void* y_pointer, int64_t batch, int64_t first, int64_t last) {
    const T* x = (const T*)x_pointer;
    T* y = (T*)y_pointer;
    const bool finite = all_finite(x, batch * matrix->columns);
    for (int64_t row = first; row < last; row++) {
        for (int64_t b = 0; b < batch; b++) {
            const T* value = (const T*)matrix->values + matrix->starts[row];
            const T* x_row = x + b * matrix->columns;
            float sum = 0;
            for (int64_t column = 0; column < matrix->columns; column += 64) {
                uint64_t word = mask_word(matrix->mask, row * matrix->columns + column);
                word &= low_bits(matrix->columns - column);
                uint64_t pruned = finite ? 0 : ~word & low_bits(matrix->columns - column);
                for (; pruned; pruned &= pruned - 1) sum += 0 * to_float(x_row[column + __builtin_ctzll(pruned)]);
                for (; word; word &= word - 1) sum += to_float(*value++) * to_float(x_row[column + __builtin_ctzll(word)]);
            }
            store_output(matrix, y + b * matrix->rows, row, sum);
        }
    }
}

template <typename T>
void expand(const Matrix* matrix, void* dense_pointer, int64_t first, int64_t last) {
    T* dense = (T*)dense_pointer;
    __builtin_memset(dense, 0, (last - first) * matrix->columns * sizeof(T));
    for (int64_t row = first; row < last; row++, dense += matrix->columns) {
        const T* value = (const T*)matrix->values + matrix->starts[row];
        for (int64_t column = 0; column < matrix->columns; column += 64) {
            uint64_t word = mask_word(matrix->mask, row * matrix->columns + column) & low_bits(matrix->columns - column);
            for (; word; word &= word - 1) dense[column + __builtin_ctzll(word)] = *value++;
        }
    }
}

template <typename T>
void dense(const Matrix* matrix, const void* x_pointer, void* y_pointer, int64_t batch, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        const T* weights = (const T*)matrix->values + row * matrix->columns;
        for (int64_t b = 0; b < batch; b++) {
            const T* x = (const T*)x_pointer + b * matrix->columns;
            float sums[8] = {0};
            int64_t column = 0;
            for (; column + 8 <= matrix->columns; column += 8)
                for (int i = 0; i < 8; i++) sums[i] += to_float(weights[column + i]) * to_float(x[column + i]);
            for (; column < matrix->columns; column++) sums[0] += to_float(weights[column]) * to_float(x[column]);
            for (int i = 1; i < 8; i++) sums[0] += sums[i];
            store_output(matrix, (T*)y_pointer + b * matrix->rows, row, sums[0]);
        }
    }
}

}  // namespace

const Kernels portable_kernels = {multiply<float>, multiply<uint16_t>, expand<uint16_t>, expand<uint32_t>,
                                  dense<float>,    dense<uint16_t>,    read_words};

const SolvingKernels portable_solving = {update_columns, nullptr, nullptr};
