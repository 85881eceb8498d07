// The loops themselves, written once over a vector type V and instantiated by one source file per processor level.
//
// V holds V::width floats and has load, store (for float, f16, bf16), fma, arithmetic operators, sqrt, max (a NaN
// wins), store_high, store_low and load_joined ([Note: split masters]), a Squares accumulator in fp64, and Numbers
// (digest.h). The last, incomplete vector goes through a zero-padded copy, so an element's result never depends on
// where in a buffer it stands: shards of any size give the bits that the whole buffer would give.
#pragma once

#include <cstring>

#include "simd/digest.h"
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

// A weight is stored as [Note: split masters] says when it is bf16, else like any number.
template <class V, class P>
void store_weight(V weight, P* to) {
    weight.store(to);
}
template <class V>
void store_weight(V weight, bf16* to) {
    weight.store_high(to);
}

template <class V, class P>
void split(void* params_bytes, std::uint16_t* remainder, const float* master, std::int64_t numel) {
    P* params = static_cast<P*>(params_bytes);
    for (std::int64_t i = 0; i < numel; i += V::width) {
        const std::int64_t count = numel - i < V::width ? numel - i : V::width;
        const V weight = V::load(Padded<V, float>(master + i, count).values);
        Padded<V, P> high;
        store_weight(weight, high.values);
        high.write(params + i, count);
        if (remainder != nullptr) {
            Padded<V, std::uint16_t> low;
            weight.store_low(low.values);
            low.write(remainder + i, count);
        }
    }
}

template <class V>
void join(float* master, const void* params_bytes, const std::uint16_t* remainder, std::int64_t numel) {
    const bf16* params = static_cast<const bf16*>(params_bytes);
    for (std::int64_t i = 0; i < numel; i += V::width) {
        const std::int64_t count = numel - i < V::width ? numel - i : V::width;
        Padded<V, float> joined;
        V::load_joined(Padded<V, bf16>(params + i, count).values, Padded<V, std::uint16_t>(remainder + i, count).values)
            .store(joined.values);
        joined.write(master + i, count);
    }
}

// Where a weight comes from and goes to: an fp32 master, beside it a parameter or none ...
template <class V, class P>
struct WholeMasters {
    float* master;
    P* params;

    explicit WholeMasters(const AdamRange& range) : master(range.master), params(static_cast<P*>(range.params)) {}
    V load(std::int64_t i) const { return V::load(master + i); }
    void store(std::int64_t i, V weight) const {
        weight.store(master + i);
        if (params != nullptr) store_weight(weight, params + i);
    }
};

// ... or a bf16 parameter and the remainder of its master.
template <class V>
struct SplitMasters {
    bf16* params;
    std::uint16_t* remainder;

    explicit SplitMasters(const AdamRange& range)
        : params(static_cast<bf16*>(range.params)), remainder(range.remainder) {}
    V load(std::int64_t i) const { return V::load_joined(params + i, remainder + i); }
    void store(std::int64_t i, V weight) const {
        weight.store_high(params + i);
        weight.store_low(remainder + i);
    }
};

template <class V, class G, class Masters>
void adam_vector(std::int64_t i, const G* grads, const Masters& masters, float* exp_avg, float* exp_avg_sq,
                 const AdamVectors<V>& f) {
    V weight = masters.load(i);
    V m = V::load(exp_avg + i);
    V v = V::load(exp_avg_sq + i);
    adam_update(weight, m, v, V::load(grads + i), f);
    masters.store(i, weight);
    m.store(exp_avg + i);
    v.store(exp_avg_sq + i);
}

// The elements that do not fill a vector, in storage that does.
template <class V, class G, class P>
struct AdamTail {
    Padded<V, G> grads;
    Padded<V, float> master, exp_avg, exp_avg_sq;
    Padded<V, P> params;
    Padded<V, std::uint16_t> remainder;
    AdamRange from;
    std::int64_t begin;

    AdamTail(const AdamRange& range, std::int64_t first)
        : grads(static_cast<const G*>(range.grads) + first, range.numel - first),
          exp_avg(range.exp_avg + first, range.numel - first),
          exp_avg_sq(range.exp_avg_sq + first, range.numel - first),
          from(range),
          begin(first) {
        const std::int64_t rest = from.numel - begin;
        if (from.master != nullptr) master = {from.master + begin, rest};
        if (from.remainder != nullptr) {
            params = {static_cast<const P*>(from.params) + begin, rest};
            remainder = {from.remainder + begin, rest};
        }
    }

    AdamRange range() {
        void* written = from.params == nullptr ? nullptr : params.values;
        return {grads.values, master.values, exp_avg.values, exp_avg_sq.values, written, remainder.values, V::width};
    }

    void write() const {
        const std::int64_t rest = from.numel - begin;
        exp_avg.write(from.exp_avg + begin, rest);
        exp_avg_sq.write(from.exp_avg_sq + begin, rest);
        if (from.master != nullptr) master.write(from.master + begin, rest);
        if (from.params != nullptr) params.write(static_cast<P*>(from.params) + begin, rest);
        if (from.remainder != nullptr) remainder.write(from.remainder + begin, rest);
    }
};

template <class V, class G, class P, class Masters>
void adam(const AdamRange& range, const AdamFactors& factors) {
    const AdamVectors<V> f(factors);
    const G* grads = static_cast<const G*>(range.grads);
    const Masters masters(range);
    std::int64_t i = 0;
    for (; i + V::width <= range.numel; i += V::width) {
        adam_vector<V>(i, grads, masters, range.exp_avg, range.exp_avg_sq, f);
    }
    if (i < range.numel) {
        AdamTail<V, G, P> tail(range, i);
        const AdamRange padded = tail.range();
        adam_vector<V>(0, tail.grads.values, Masters(padded), padded.exp_avg, padded.exp_avg_sq, f);
        tail.write();
    }
}

template <class V, class From, class To>
void fill_pair(Kernels& k) {
    constexpr int from = index(dtype_of<From>::value), to = index(dtype_of<To>::value);
    k.copy[from][to] = convert<V, From, To, false>;
    k.accumulate[from][to] = convert<V, From, To, true>;
    k.adam[from][to] = adam<V, From, To, WholeMasters<V, To>>;
}

template <class V, class From>
void fill_row(Kernels& k) {
    fill_pair<V, From, float>(k);
    fill_pair<V, From, f16>(k);
    fill_pair<V, From, bf16>(k);
    constexpr int from = index(dtype_of<From>::value);
    k.split_adam[from] = adam<V, From, bf16, SplitMasters<V>>;
    k.split[from] = split<V, From>;
    k.sum_of_squares[from] = sum_of_squares<V, From>;
    k.sum[from] = reduce<V, From, false>;
    k.max[from] = reduce<V, From, true>;
}

template <class V>
Kernels make_kernels() {
    Kernels k{};
    fill_row<V, float>(k);
    fill_row<V, f16>(k);
    fill_row<V, bf16>(k);
    k.join = join<V>;
    k.digest = digest<typename V::Numbers>;
    return k;
}

}  // namespace partita::loops
