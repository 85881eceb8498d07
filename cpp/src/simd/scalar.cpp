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
};

}  // namespace

const Kernels& scalar_kernels() {
    static const Kernels table = loops::make_kernels<Scalar>();
    return table;
}

}  // namespace partita
