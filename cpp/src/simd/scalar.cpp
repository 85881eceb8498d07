// Portable C++: the level that runs everywhere.
#include <cmath>

#include "simd/half.h"
#include "simd/loops.h"

namespace partita {
namespace {

struct Scalar {
    static constexpr std::int64_t width = 1;
    float x;

    static Scalar broadcast(float value) { return {value}; }
    template <class T>
    static Scalar load(const T* from) {
        return {to_float(*from)};
    }
    template <class T>
    void store(T* to) const {
        from_float(*to, x);
    }
    void store_high(bf16* to) const {
        const std::uint32_t bits = bits_of(x);
        to->bits = static_cast<std::uint16_t>((std::isnan(x) ? bits | 0x400000u : bits + 0x8000u) >> 16);
    }
    void store_low(std::uint16_t* to) const { *to = static_cast<std::uint16_t>(std::isnan(x) ? 0u : bits_of(x)); }
    static Scalar load_joined(const bf16* high, const std::uint16_t* low) {
        const auto remainder = static_cast<std::uint32_t>(static_cast<std::int16_t>(*low));
        return {float_of((std::uint32_t{high->bits} << 16) + remainder)};
    }
    static Scalar fma(Scalar a, Scalar b, Scalar c) { return {std::fma(a.x, b.x, c.x)}; }
    static Scalar max(Scalar a, Scalar b) { return {std::isnan(a.x) || a.x > b.x ? a.x : b.x}; }
    Scalar sqrt() const { return {std::sqrt(x)}; }
    friend Scalar operator+(Scalar a, Scalar b) { return {a.x + b.x}; }
    friend Scalar operator-(Scalar a, Scalar b) { return {a.x - b.x}; }
    friend Scalar operator*(Scalar a, Scalar b) { return {a.x * b.x}; }
    friend Scalar operator/(Scalar a, Scalar b) { return {a.x / b.x}; }

    struct Squares {
        double sum = 0;
        void add(Scalar v) { sum += static_cast<double>(v.x) * v.x; }
        double total() const { return sum; }
    };

    struct Numbers {
        static constexpr int width = 2;
        std::uint64_t x, y;

        static Numbers load(const unsigned char* from) {
            Numbers numbers;
            std::memcpy(&numbers, from, sizeof numbers);
            return numbers;
        }
        void store(unsigned char* to) const { std::memcpy(to, this, sizeof *this); }
        friend Numbers operator+(Numbers a, Numbers b) { return {a.x + b.x, a.y + b.y}; }
        friend Numbers operator^(Numbers a, Numbers b) { return {a.x ^ b.x, a.y ^ b.y}; }
        template <int bits>
        Numbers shifted_right() const {
            return {x >> bits, y >> bits};
        }
        Numbers swapped() const { return {y, x}; }
        Numbers times(std::uint32_t factor) const { return {x * factor, y * factor}; }
        Numbers product_of_halves() const { return {(x & 0xffffffff) * (x >> 32), (y & 0xffffffff) * (y >> 32)}; }
    };
};

}  // namespace

const Kernels& scalar_kernels() {
    static const Kernels table = loops::make_kernels<Scalar>();
    return table;
}

}  // namespace partita
