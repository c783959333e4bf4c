// One packed matrix as the kernels see it, and the functions that every instruction set provides.
//
// y[b][r] = sum over c of W[r][c] · x[b][c] (+ bias[r]), W stored row by row: bit r·columns + c of `mask` says whether
// W[r][c] is kept, and the kept values follow each other. The buffers of mask and values may be read up to 64 bytes
// past their ends. Sums are float32.
#pragma once
#include <stdint.h>

struct Matrix {
    const uint8_t* mask;
    const void* values;
    const int64_t* starts;  // rows + 1: how many values come before each row
    const void* bias;       // rows, of the weights' type, or null
    int64_t rows;
    int64_t columns;
};

// x: batch × columns of the weights' type; y: batch × rows, first row's element at y[first].
typedef void (*MultiplyRows)(const Matrix* matrix, const void* x, void* y, int64_t batch, int64_t first, int64_t last);
// dense: (last − first) × columns of the weights' type.
typedef void (*ExpandRows)(const Matrix* matrix, void* dense, int64_t first, int64_t last);

// The same product with a dense matrix (`values` is all of it, the mask is not read), to compare with.
typedef MultiplyRows MultiplyDense;
// Reads count 8-byte words, to measure the memory's bandwidth.
typedef uint64_t (*ReadWords)(const uint64_t* words, int64_t count);

// A null pointer means: the portable one.
struct Kernels {
    MultiplyRows multiply_float32;
    MultiplyRows multiply_bfloat16;
    ExpandRows expand_2_bytes;
    ExpandRows expand_4_bytes;
    MultiplyDense dense_float32;
    MultiplyDense dense_bfloat16;
    ReadWords read_words;
};

extern const Kernels portable_kernels;
#ifdef COPRUNE_X86
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512_vbmi2_kernels;
#endif

// Everything below is compiled once per instruction set, hence without external names.
namespace {

inline uint64_t load_64(const uint8_t* bytes) {
    uint64_t word;
    __builtin_memcpy(&word, bytes, 8);
    return word;
}

// 64 bits that start at any bit (those past the end of a row belong to the next one).
inline uint64_t mask_word(const uint8_t* mask, int64_t bit) {
    const uint8_t* at = mask + (bit >> 3);
    const int shift = bit & 7;
    return (load_64(at) >> shift) | ((uint64_t)at[8] << 1 << (63 - shift));
}

inline uint64_t low_bits(int64_t count) { return count >= 64 ? ~0ULL : (1ULL << count) - 1; }

inline uint64_t read_words(const uint64_t* words, int64_t count) {
    uint64_t sums[32] = {0};  // independent chains, which the compiler keeps in vector registers
    for (; count >= 32; count -= 32, words += 32)
        for (int i = 0; i < 32; i++) sums[i] += words[i];
    for (int i = 1; i < 32; i++) sums[0] += sums[i];
    return sums[0];
}

inline float to_float(float value) { return value; }
inline float to_float(uint16_t bfloat16) {
    const uint32_t bits = (uint32_t)bfloat16 << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

inline void store(float* at, float value) { *at = value; }
inline void store(uint16_t* at, float value) {  // round to nearest even; NaN stays NaN
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) {
        *at = (uint16_t)((bits >> 16) | 64);
        return;
    }
    *at = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <typename T>
inline void store_output(const Matrix* matrix, T* y, int64_t row, float sum) {
    store(y + row, matrix->bias ? sum + to_float(((const T*)matrix->bias)[row]) : sum);
}

}  // namespace
