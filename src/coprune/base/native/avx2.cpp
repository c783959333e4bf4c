// AVX2: 8 float32 lanes, expanded by a permutation that a table gives for every 8 bits of mask.
#include <immintrin.h>

#include "rows.h"
#include "columns.h"

namespace {

struct Table {
    alignas(32) int32_t lane[256][8];
    constexpr Table() : lane() {
        for (int bits = 0; bits < 256; bits++)
            for (int at = 0, next = 0; at < 8; at++) lane[bits][at] = bits >> at & 1 ? next++ : 0;
    }
};
constexpr Table table;

inline __m256i lanes_of(uint32_t bits) {  // all ones in the lanes whose bit is set
    const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), each), each);
}

inline __m256 expand_8(uint32_t bits, __m256 values) {
    const __m256 spread = _mm256_permutevar8x32_ps(values, _mm256_load_si256((const __m256i*)table.lane[bits & 255]));
    return _mm256_and_ps(spread, _mm256_castsi256_ps(lanes_of(bits)));
}

struct Narrow {
    typedef __m256 Input;
    typedef __m256 Sum;
    static constexpr int LANES = 8, AHEAD = 512, REGISTERS = 16;
    static Sum zero() { return _mm256_setzero_ps(); }
    static Sum multiply_add(__m256 weights, Input input, Sum sum) { return _mm256_fmadd_ps(weights, input, sum); }
    static float total(Sum sum) {
        const __m128 half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
        const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
    }
};

struct Float32 : Narrow {
    typedef float Value;
    static Input load(const float* x) { return _mm256_loadu_ps(x); }
    static Input load(const float* x, int count) { return _mm256_maskload_ps(x, lanes_of((uint32_t)low_bits(count))); }
    static __m256 expand(uint32_t bits, const float* values) { return expand_8(bits, _mm256_loadu_ps(values)); }
};

struct Bfloat16 : Narrow {
    typedef uint16_t Value;
    static Input load(const uint16_t* x) {
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    static Input load(const uint16_t* x, int count) {
        uint16_t padded[8] = {0};
        __builtin_memcpy(padded, x, 2 * count);
        return load(padded);
    }
    static __m256 expand(uint32_t bits, const uint16_t* values) { return expand_8(bits, load(values)); }
};

void expand_4_bytes(const Matrix* matrix, void* dense_pointer, int64_t first, int64_t last) {
    float* dense = (float*)dense_pointer;
    for (int64_t row = first; row < last; row++, dense += matrix->columns) {
        const float* values = (const float*)matrix->values + matrix->starts[row];
        for (int64_t column = 0; column < matrix->columns; column += 64) {
            uint64_t word = mask_word(matrix->mask, row * matrix->columns + column) & low_bits(matrix->columns - column);
            for (int64_t at = column; at < column + 64 && at < matrix->columns; at += 8, word >>= 8) {
                const __m256 lanes = expand_8((uint32_t)word, _mm256_loadu_ps(values));
                if (matrix->columns - at >= 8) _mm256_storeu_ps(dense + at, lanes);
                else _mm256_maskstore_ps(dense + at, lanes_of((uint32_t)low_bits(matrix->columns - at)), lanes);
                values += __builtin_popcount(word & 255);
            }
        }
    }
}

}  // namespace

// 2-byte elements have no cheap permutation in AVX2; the plain loop is as fast as splitting and joining them.
const Kernels avx2_kernels = {multiply_rows<Float32>, multiply_rows<Bfloat16>, nullptr,   expand_4_bytes,
                              dense_rows<Float32>,    dense_rows<Bfloat16>,    read_words};

const SolvingKernels avx2_solving = {update_columns, nullptr, nullptr};
