// AVX-512 without VBMI2 (from Skylake-X): 2-byte elements are expanded as 4-byte ones.
#include "avx512.h"
#include "columns.h"

namespace {

void expand_2_bytes(const Matrix* matrix, void* dense_pointer, int64_t first, int64_t last) {
    uint16_t* dense = (uint16_t*)dense_pointer;
    for (int64_t row = first; row < last; row++, dense += matrix->columns) {
        const uint16_t* values = (const uint16_t*)matrix->values + matrix->starts[row];
        for (int64_t column = 0; column < matrix->columns; column += 64) {
            uint64_t word = mask_word(matrix->mask, row * matrix->columns + column) & low_bits(matrix->columns - column);
            for (int64_t at = column; at < column + 64 && at < matrix->columns; at += 16, word >>= 16) {
                const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)values));
                const __m512i lanes = expand_32((__mmask16)word, wide);
                const __mmask16 exists = (__mmask16)low_bits(matrix->columns - at);
                _mm256_mask_storeu_epi16(dense + at, exists, _mm512_cvtepi32_epi16(lanes));
                values += __builtin_popcount(word & 0xffff);
            }
        }
    }
}

}  // namespace

const Kernels avx512_kernels = {
    multiply_rows<Float32>, multiply_rows<Bfloat16Widened>, expand_2_bytes, expand_4_bytes,
    dense_rows<Float32>,    dense_rows<Bfloat16Widened>,    read_words,
};

const SolvingKernels avx512_solving = {update_columns, nullptr, nullptr};
