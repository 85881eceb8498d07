// Sixteen floats at a time; compiled with AVX-512 F, BW, DQ and VL switched on.
// The header's intrinsics read registers that they leave undefined on purpose, and GCC 12 warns (bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "simd/loops.h"

namespace partita {
namespace {

struct Avx512 {
    static constexpr std::int64_t width = 16;
    __m512 x;

    static Avx512 broadcast(float value) { return {_mm512_set1_ps(value)}; }
    static Avx512 load(const float* from) { return {_mm512_loadu_ps(from)}; }
    static Avx512 load(const f16* from) {
        return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
    }
    static Avx512 load(const bf16* from) {
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
    }
    void store(float* to) const { _mm512_storeu_ps(to, x); }
    void store(f16* to) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                            _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    // Not VCVTNEPS2BF16: that instruction flushes subnormal numbers to zero.
    void store(bf16* to) const {
        const __m512i bits = _mm512_castps_si512(x);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
        const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        const __m512i result = _mm512_srli_epi32(_mm512_mask_blend_epi32(is_nan, rounded, quiet), 16);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(result));
    }
    void store_high(bf16* to) const {
        const __m512i bits = _mm512_castps_si512(x);
        const __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x8000));
        const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
        const __m512i result = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), rounded, quiet);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16)));
    }
    void store_low(std::uint16_t* to) const {
        const __m512i low = _mm512_maskz_mov_epi32(_mm512_cmp_ps_mask(x, x, _CMP_ORD_Q), _mm512_castps_si512(x));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(low));
    }
    static Avx512 load_joined(const bf16* high, const std::uint16_t* low) {
        const __m256i remainder = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low));
        return {
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(load(high).x), _mm512_cvtepi16_epi32(remainder)))};
    }
    static Avx512 fma(Avx512 a, Avx512 b, Avx512 c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
    // The instruction gives its second operand when either is a NaN.
    static Avx512 max(Avx512 a, Avx512 b) {
        return {_mm512_mask_mov_ps(_mm512_max_ps(a.x, b.x), _mm512_cmp_ps_mask(a.x, a.x, _CMP_UNORD_Q), a.x)};
    }
    Avx512 sqrt() const { return {_mm512_sqrt_ps(x)}; }
    friend Avx512 operator+(Avx512 a, Avx512 b) { return {_mm512_add_ps(a.x, b.x)}; }
    friend Avx512 operator-(Avx512 a, Avx512 b) { return {_mm512_sub_ps(a.x, b.x)}; }
    friend Avx512 operator*(Avx512 a, Avx512 b) { return {_mm512_mul_ps(a.x, b.x)}; }
    friend Avx512 operator/(Avx512 a, Avx512 b) { return {_mm512_div_ps(a.x, b.x)}; }

    struct Squares {
        __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
        void add(Avx512 v) {
            const __m512d a = _mm512_cvtps_pd(_mm512_castps512_ps256(v.x));
            const __m512d b = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v.x, 1));
            low = _mm512_fmadd_pd(a, a, low);
            high = _mm512_fmadd_pd(b, b, high);
        }
        double total() const { return _mm512_reduce_add_pd(_mm512_add_pd(low, high)); }
    };

    struct Numbers {
        static constexpr int width = 8;
        __m512i x;

        static Numbers load(const unsigned char* from) { return {_mm512_loadu_si512(from)}; }
        void store(unsigned char* to) const { _mm512_storeu_si512(to, x); }
        friend Numbers operator+(Numbers a, Numbers b) { return {_mm512_add_epi64(a.x, b.x)}; }
        friend Numbers operator^(Numbers a, Numbers b) { return {_mm512_xor_si512(a.x, b.x)}; }
        template <int bits>
        Numbers shifted_right() const {
            return {_mm512_srli_epi64(x, bits)};
        }
        Numbers swapped() const { return {_mm512_permutex_epi64(x, _MM_SHUFFLE(2, 3, 0, 1))}; }
        Numbers times(std::uint32_t factor) const { return {_mm512_mullo_epi64(x, _mm512_set1_epi64(factor))}; }
        Numbers product_of_halves() const { return {_mm512_mul_epu32(x, _mm512_srli_epi64(x, 32))}; }
    };
};

}  // namespace

const Kernels& avx512_kernels() {
    static const Kernels table = loops::make_kernels<Avx512>();
    return table;
}

}  // namespace partita
