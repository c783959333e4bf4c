// AVX-512: 16 float32 lanes, expanded by vexpandps; bfloat16 weights are widened first.
#pragma once
#include <immintrin.h>

#include "rows.h"

namespace {

// What the compiler would do with a plain _mm512_maskz_expand of a load costs a factor of ten on AMD processors:
// - it folds the two into the memory form of vexpand, which runs in microcode. The load is kept apart; it never
//   faults, since 64 bytes follow the values.
// - even with zeroing, vexpand waits for the old content of its destination (5 cycles on Zen 5, measured). Merging
//   into a register of zeros leaves nothing to wait for.
template <typename T>
inline T in_register(T value) {
    asm("" : "+v"(value));
    return value;
}

inline __m512i expand_32(__mmask16 bits, __m512i values) {
    return _mm512_mask_expand_epi32(in_register(_mm512_setzero_si512()), bits, in_register(values));
}

struct Wide {
    typedef __m512 Input;
    typedef __m512 Sum;
    static constexpr int LANES = 16, AHEAD = 2048, REGISTERS = 32;
    static Sum zero() { return _mm512_setzero_ps(); }
    static Sum multiply_add(__m512 weights, Input input, Sum sum) { return _mm512_fmadd_ps(weights, input, sum); }
    static float total(Sum sum) { return _mm512_reduce_add_ps(sum); }
};

struct Float32 : Wide {
    typedef float Value;
    static Input load(const float* x) { return _mm512_loadu_ps(x); }
    static Input load(const float* x, int count) { return _mm512_maskz_loadu_ps((__mmask16)low_bits(count), x); }
    static __m512 expand(uint32_t bits, const float* values) {
        return _mm512_castsi512_ps(expand_32((__mmask16)bits, _mm512_loadu_si512(values)));
    }
};

struct Bfloat16Widened : Wide {
    typedef uint16_t Value;
    static __m512i widen(__m256i values) { return _mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16); }
    static Input load(const uint16_t* x) { return _mm512_castsi512_ps(widen(_mm256_loadu_si256((const __m256i*)x))); }
    static Input load(const uint16_t* x, int count) {
        return _mm512_castsi512_ps(widen(_mm256_maskz_loadu_epi16((__mmask16)low_bits(count), x)));
    }
    static __m512 expand(uint32_t bits, const uint16_t* values) {
        return _mm512_castsi512_ps(expand_32((__mmask16)bits, widen(_mm256_loadu_si256((const __m256i*)values))));
    }
};

inline void expand_4_bytes(const Matrix* matrix, void* dense_pointer, int64_t first, int64_t last) {
    uint32_t* dense = (uint32_t*)dense_pointer;
    for (int64_t row = first; row < last; row++, dense += matrix->columns) {
        const uint32_t* values = (const uint32_t*)matrix->values + matrix->starts[row];
        for (int64_t column = 0; column < matrix->columns; column += 64) {
            uint64_t word = mask_word(matrix->mask, row * matrix->columns + column) & low_bits(matrix->columns - column);
            __builtin_prefetch((const char*)values + Wide::AHEAD);
            __builtin_prefetch((const char*)values + Wide::AHEAD + 64);
            for (int64_t at = column; at < column + 64 && at < matrix->columns; at += 16, word >>= 16) {
                const __m512i lanes = expand_32((__mmask16)word, _mm512_loadu_si512(values));
                _mm512_mask_storeu_epi32(dense + at, (__mmask16)low_bits(matrix->columns - at), lanes);
                values += __builtin_popcount(word & 0xffff);
            }
        }
    }
}

}  // namespace
