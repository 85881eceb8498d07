// Eight floats at a time; compiled with AVX2, FMA and F16C switched on.
#include <immintrin.h>

#include "simd/loops.h"

namespace partita {
namespace {

struct Avx2 {
    static constexpr std::int64_t width = 8;
    __m256 x;

    static Avx2 broadcast(float value) { return {_mm256_set1_ps(value)}; }
    static Avx2 load(const float* from) { return {_mm256_loadu_ps(from)}; }
    static Avx2 load(const f16* from) {
        return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
    }
    static Avx2 load(const bf16* from) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
    }
    void store(float* to) const { _mm256_storeu_ps(to, x); }
    void store(f16* to) const {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                         _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    void store(bf16* to) const {
        const __m256i bits = _mm256_castps_si256(x);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
        const __m256 is_nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
        const __m256i result = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(is_nan));
        store_16_bits(to, _mm256_srli_epi32(result, 16));
    }
    void store_high(bf16* to) const {
        const __m256i bits = _mm256_castps_si256(x);
        const __m256i rounded = _mm256_add_epi32(bits, _mm256_set1_epi32(0x8000));
        const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
        const __m256 is_nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
        const __m256i result = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(is_nan));
        store_16_bits(to, _mm256_srli_epi32(result, 16));
    }
    void store_low(std::uint16_t* to) const {
        const __m256i number = _mm256_castps_si256(_mm256_and_ps(x, _mm256_cmp_ps(x, x, _CMP_ORD_Q)));
        store_16_bits(to, _mm256_and_si256(number, _mm256_set1_epi32(0xffff)));
    }
    static Avx2 load_joined(const bf16* high, const std::uint16_t* low) {
        const __m256i remainder = _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low)));
        return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(load(high).x), remainder))};
    }
    static Avx2 fma(Avx2 a, Avx2 b, Avx2 c) { return {_mm256_fmadd_ps(a.x, b.x, c.x)}; }
    // The instruction gives its second operand when either is a NaN.
    static Avx2 max(Avx2 a, Avx2 b) {
        return {_mm256_blendv_ps(_mm256_max_ps(a.x, b.x), a.x, _mm256_cmp_ps(a.x, a.x, _CMP_UNORD_Q))};
    }
    Avx2 sqrt() const { return {_mm256_sqrt_ps(x)}; }
    friend Avx2 operator+(Avx2 a, Avx2 b) { return {_mm256_add_ps(a.x, b.x)}; }
    friend Avx2 operator-(Avx2 a, Avx2 b) { return {_mm256_sub_ps(a.x, b.x)}; }
    friend Avx2 operator*(Avx2 a, Avx2 b) { return {_mm256_mul_ps(a.x, b.x)}; }
    friend Avx2 operator/(Avx2 a, Avx2 b) { return {_mm256_div_ps(a.x, b.x)}; }

    // Eight numbers below 2^16.
    static void store_16_bits(void* to, __m256i values) {
        // packus works within 128-bit lanes: bring the two used quarters together.
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(values, values), 0x08);
        _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
    }

    struct Squares {
        __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();
        void add(Avx2 v) {
            const __m256d a = _mm256_cvtps_pd(_mm256_castps256_ps128(v.x));
            const __m256d b = _mm256_cvtps_pd(_mm256_extractf128_ps(v.x, 1));
            low = _mm256_fmadd_pd(a, a, low);
            high = _mm256_fmadd_pd(b, b, high);
        }
        double total() const {
            double lanes[4];
            _mm256_storeu_pd(lanes, _mm256_add_pd(low, high));
            return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
        }
    };

    struct Numbers {
        static constexpr int width = 4;
        __m256i x;

        static Numbers load(const unsigned char* from) {
            return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))};
        }
        void store(unsigned char* to) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x); }
        friend Numbers operator+(Numbers a, Numbers b) { return {_mm256_add_epi64(a.x, b.x)}; }
        friend Numbers operator^(Numbers a, Numbers b) { return {_mm256_xor_si256(a.x, b.x)}; }
        template <int bits>
        Numbers shifted_right() const {
            return {_mm256_srli_epi64(x, bits)};
        }
        Numbers swapped() const { return {_mm256_shuffle_epi32(x, _MM_SHUFFLE(1, 0, 3, 2))}; }
        Numbers times(std::uint32_t factor) const {
            const __m256i factors = _mm256_set1_epi64x(factor);
            const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), factors);
            return {_mm256_add_epi64(_mm256_mul_epu32(x, factors), _mm256_slli_epi64(high, 32))};
        }
        Numbers product_of_halves() const { return {_mm256_mul_epu32(x, _mm256_srli_epi64(x, 32))}; }
    };
};

}  // namespace

const Kernels& avx2_kernels() {
    static const Kernels table = loops::make_kernels<Avx2>();
    return table;
}

}  // namespace partita
