// AVX-512 with VBMI2 and BF16 (Zen 4, Cooper/Sapphire Rapids and later): 32 bfloat16 lanes, expanded by vexpandw and
// multiplied in pairs by vdpbf16ps, which sums in float32 (subnormals count as zero).
#include "avx512.h"
#include "columns.h"
#include "gram.h"

namespace {

inline __m512i expand_16(__mmask32 bits, const uint16_t* values) {
    const __m512i loaded = in_register(_mm512_loadu_si512(values));
    return _mm512_mask_expand_epi16(in_register(_mm512_setzero_si512()), bits, loaded);
}

struct Bfloat16 {
    typedef uint16_t Value;
    typedef __m512i Input;
    typedef __m512 Sum;
    static constexpr int LANES = 32, AHEAD = 2048, REGISTERS = 32;
    static Sum zero() { return _mm512_setzero_ps(); }
    static Input load(const uint16_t* x) { return _mm512_loadu_si512(x); }
    static Input load(const uint16_t* x, int count) { return _mm512_maskz_loadu_epi16((__mmask32)low_bits(count), x); }
    static __m512i expand(uint32_t bits, const uint16_t* values) {
        return expand_16(bits, values);
    }
    static Sum multiply_add(__m512i weights, Input input, Sum sum) {
        return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)input);
    }
    static float total(Sum sum) { return _mm512_reduce_add_ps(sum); }
};

void expand_2_bytes(const Matrix* matrix, void* dense_pointer, int64_t first, int64_t last) {
    uint16_t* dense = (uint16_t*)dense_pointer;
    for (int64_t row = first; row < last; row++, dense += matrix->columns) {
        const uint16_t* values = (const uint16_t*)matrix->values + matrix->starts[row];
        int64_t column = 0;
        for (; column + 64 <= matrix->columns; column += 64) {
            const uint64_t word = mask_word(matrix->mask, row * matrix->columns + column);
            __builtin_prefetch((const char*)values + Bfloat16::AHEAD);
            __builtin_prefetch((const char*)values + Bfloat16::AHEAD + 64);
            uint64_t low = (uint32_t)word, high = word >> 32;
            asm("" : "+r"(low), "+r"(high));  // as in rows.h
            _mm512_storeu_si512(dense + column, expand_16((__mmask32)low, values));
            values += __builtin_popcountll(low);
            _mm512_storeu_si512(dense + column + 32, expand_16((__mmask32)high, values));
            values += __builtin_popcountll(high);
        }
        for (; column < matrix->columns; column += 64) {
            uint64_t word = mask_word(matrix->mask, row * matrix->columns + column) & low_bits(matrix->columns - column);
            for (int64_t at = column; at < column + 64 && at < matrix->columns; at += 32, word >>= 32) {
                const __m512i lanes = expand_16((__mmask32)word, values);
                _mm512_mask_storeu_epi16(dense + at, (__mmask32)low_bits(matrix->columns - at), lanes);
                values += __builtin_popcount((uint32_t)word);
            }
        }
    }
}

}  // namespace

const Kernels avx512_vbmi2_kernels = {
    multiply_rows<Float32>, multiply_rows<Bfloat16>, expand_2_bytes, expand_4_bytes,
    dense_rows<Float32>,    dense_rows<Bfloat16>,    read_words,
};

const SolvingKernels avx512_vbmi2_solving = {update_columns, gram_rearrange, gram_multiply};
