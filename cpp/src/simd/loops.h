// The loops themselves, written once over a vector type V and instantiated by one source file per processor level.
//
// V holds V::width floats and has load, store (for float, f16, bf16), fma, arithmetic operators, sqrt, max (a NaN
// wins), and a Squares accumulator in fp64. The last, incomplete vector goes through a zero-padded copy, so an
// element's result never depends on where in a buffer it stands: shards of any size give the bits that the whole buffer
// would give.
#pragma once

#include <cstring>

#include "simd/element.h"
#include "simd/kernels.h"

namespace partita::loops {

// Up to V::width elements in full-width storage.
template <class V, class T>
struct Padded {
    T values[V::width] = {};

    Padded() = default;
    Padded(const T* from, std::int64_t numel) { std::memcpy(values, from, numel * sizeof(T)); }
    void write(T* to, std::int64_t numel) const { std::memcpy(to, values, numel * sizeof(T)); }
};

template <class V, class From, class To, bool accumulate>
void convert_vector(To* to, const From* from, V scale) {
    V value = V::load(from) * scale;
    if constexpr (accumulate) value = V::load(to) + value;
    value.store(to);
}

template <class V, class From, class To, bool accumulate>
void convert(void* to_bytes, const void* from_bytes, std::int64_t numel, float scale) {
    To* to = static_cast<To*>(to_bytes);
    const From* from = static_cast<const From*>(from_bytes);
    const V factor = V::broadcast(scale);
    std::int64_t i = 0;
    for (; i + V::width <= numel; i += V::width) convert_vector<V, From, To, accumulate>(to + i, from + i, factor);
    if (const std::int64_t rest = numel - i; rest > 0) {
        Padded<V, From> tail_from(from + i, rest);
        Padded<V, To> tail_to(to + i, rest);
        convert_vector<V, From, To, accumulate>(tail_to.values, tail_from.values, factor);
        tail_to.write(to + i, rest);
    }
}

template <class V, class T>
double sum_of_squares(const void* bytes, std::int64_t numel) {
    const T* values = static_cast<const T*>(bytes);
    typename V::Squares a, b;  // two chains of additions in flight
    std::int64_t i = 0;
    for (; i + 2 * V::width <= numel; i += 2 * V::width) {
        a.add(V::load(values + i));
        b.add(V::load(values + i + V::width));
    }
    for (; i < numel; i += V::width) {
        const std::int64_t rest = numel - i < V::width ? numel - i : V::width;
        a.add(V::load(Padded<V, T>(values + i, rest).values));
    }
    return a.total() + b.total();
}

template <class V, bool maximum>
V combine(V total, V value) {
    if constexpr (maximum) return V::max(total, value);
    return total + value;
}

template <class V, class T, bool maximum>
void reduce(void* to_bytes, const void* const* from, int sources, std::int64_t begin, std::int64_t numel, float scale) {
    constexpr int together = 4;  // vectors per turn, so that loads of several sources are in flight
    T* to = static_cast<T*>(to_bytes);
    const V factor = V::broadcast(scale);
    const auto source = [&](int s) { return static_cast<const T*>(from[s]) + begin; };
    std::int64_t i = 0;
    for (; i + together * V::width <= numel; i += together * V::width) {
        V total[together];
        for (int v = 0; v < together; ++v) total[v] = V::load(source(0) + i + v * V::width);
        for (int s = 1; s < sources; ++s) {
            const T* values = source(s) + i;
            for (int v = 0; v < together; ++v) {
                total[v] = combine<V, maximum>(total[v], V::load(values + v * V::width));
            }
        }
        for (int v = 0; v < together; ++v) (total[v] * factor).store(to + i + v * V::width);
    }
    for (; i < numel; i += V::width) {
        const std::int64_t rest = numel - i < V::width ? numel - i : V::width;
        V total = V::load(Padded<V, T>(source(0) + i, rest).values);
        for (int s = 1; s < sources; ++s) {
            total = combine<V, maximum>(total, V::load(Padded<V, T>(source(s) + i, rest).values));
        }
        Padded<V, T> result;
        (total * factor).store(result.values);
        result.write(to + i, rest);
    }
}

template <class V>
struct AdamVectors {
    V grad_scale, l2, keep, one_minus_beta1, beta2, one_minus_beta2, inverse_sqrt_correction2, eps, step_size;

    explicit AdamVectors(const AdamFactors& f)
        : grad_scale(V::broadcast(f.grad_scale)),
          l2(V::broadcast(f.l2)),
          keep(V::broadcast(f.keep)),
          one_minus_beta1(V::broadcast(f.one_minus_beta1)),
          beta2(V::broadcast(f.beta2)),
          one_minus_beta2(V::broadcast(f.one_minus_beta2)),
          inverse_sqrt_correction2(V::broadcast(f.inverse_sqrt_correction2)),
          eps(V::broadcast(f.eps)),
          step_size(V::broadcast(f.step_size)) {}
};

template <class V, class G, class P>
void adam_vector(const G* grads, float* master, float* exp_avg, float* exp_avg_sq, P* params, const AdamVectors<V>& f) {
    V weight = V::load(master);
    const V grad = V::fma(f.l2, weight, V::load(grads) * f.grad_scale);
    V m = V::load(exp_avg);
    V v = V::load(exp_avg_sq);
    m = V::fma(f.one_minus_beta1, grad - m, m);
    v = V::fma(f.one_minus_beta2 * grad, grad, f.beta2 * v);
    const V denominator = V::fma(v.sqrt(), f.inverse_sqrt_correction2, f.eps);
    weight = weight * f.keep - f.step_size * m / denominator;
    weight.store(master);
    m.store(exp_avg);
    v.store(exp_avg_sq);
    if (params != nullptr) weight.store(params);
}

template <class V, class G, class P>
void adam(const AdamRange& range, const AdamFactors& factors) {
    const AdamVectors<V> f(factors);
    const G* grads = static_cast<const G*>(range.grads);
    P* params = static_cast<P*>(range.params);
    std::int64_t i = 0;
    for (; i + V::width <= range.numel; i += V::width) {
        adam_vector<V>(grads + i, range.master + i, range.exp_avg + i, range.exp_avg_sq + i,
                       params != nullptr ? params + i : nullptr, f);
    }
    if (const std::int64_t rest = range.numel - i; rest > 0) {
        Padded<V, G> g(grads + i, rest);
        Padded<V, float> w(range.master + i, rest), m(range.exp_avg + i, rest), v(range.exp_avg_sq + i, rest);
        Padded<V, P> p;
        adam_vector<V>(g.values, w.values, m.values, v.values, p.values, f);
        w.write(range.master + i, rest);
        m.write(range.exp_avg + i, rest);
        v.write(range.exp_avg_sq + i, rest);
        if (params != nullptr) p.write(params + i, rest);
    }
}

template <class V, class From, class To>
void fill_pair(Kernels& k) {
    constexpr int from = index(dtype_of<From>::value), to = index(dtype_of<To>::value);
    k.copy[from][to] = convert<V, From, To, false>;
    k.accumulate[from][to] = convert<V, From, To, true>;
    k.adam[from][to] = adam<V, From, To>;
}

template <class V, class From>
void fill_row(Kernels& k) {
    fill_pair<V, From, float>(k);
    fill_pair<V, From, f16>(k);
    fill_pair<V, From, bf16>(k);
    k.sum_of_squares[index(dtype_of<From>::value)] = sum_of_squares<V, From>;
    k.sum[index(dtype_of<From>::value)] = reduce<V, From, false>;
    k.max[index(dtype_of<From>::value)] = reduce<V, From, true>;
}

template <class V>
Kernels make_kernels() {
    Kernels k{};
    fill_row<V, float>(k);
    fill_row<V, f16>(k);
    fill_row<V, bf16>(k);
    return k;
}

}  // namespace partita::loops
