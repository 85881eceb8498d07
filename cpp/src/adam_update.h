// Adam's arithmetic, once for every processor. A vector type V holds floats and has broadcast, fma, sqrt and the
// arithmetic operators, each rounded once; so all processors give the same bits.
#pragma once

#include <cmath>

#include "host_device.h"
#include "partita/adam.h"

namespace partita {

// The per-element constants of one group and step.
struct AdamFactors {
    float grad_scale;
    float l2;    // weight decay that joins the gradient
    float keep;  // what decoupled decay leaves of the weight
    float one_minus_beta1;
    float beta2;
    float one_minus_beta2;
    float inverse_sqrt_correction2;
    float eps;
    float step_size;  // lr / first bias correction
};

// By squaring, not by pow(), whose last bit differs between libraries.
PARTITA_HOST_DEVICE inline double power(double base, std::int64_t exponent) {
    double result = 1.0;
    for (; exponent > 0; exponent >>= 1, base *= base) {
        if ((exponent & 1) != 0) result *= base;
    }
    return result;
}

PARTITA_HOST_DEVICE inline AdamFactors adam_factors(const AdamGroup& group, const StepControl& control) {
    const std::int64_t step = control.step - group.waited;
    const double correction1 = group.bias_correction ? 1.0 - power(group.beta1, step) : 1.0;
    const double correction2 = group.bias_correction ? 1.0 - power(group.beta2, step) : 1.0;
    AdamFactors f{};
    f.grad_scale = control.grad_scale;
    f.l2 = static_cast<float>(group.decoupled ? 0.0 : group.weight_decay);
    f.keep = static_cast<float>(group.decoupled ? 1.0 - group.lr * group.weight_decay : 1.0);
    f.one_minus_beta1 = static_cast<float>(1.0 - group.beta1);
    f.beta2 = static_cast<float>(group.beta2);
    f.one_minus_beta2 = static_cast<float>(1.0 - group.beta2);
    f.inverse_sqrt_correction2 = static_cast<float>(1.0 / sqrt(correction2));
    f.eps = static_cast<float>(group.eps);
    f.step_size = static_cast<float>(group.lr / correction1);
    return f;
}

template <class V>
struct AdamVectors {
    V grad_scale, l2, keep, one_minus_beta1, beta2, one_minus_beta2, inverse_sqrt_correction2, eps, step_size;

    PARTITA_DEVICE explicit AdamVectors(const AdamFactors& f)
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

// The new weight and moments for a stored gradient.
template <class V>
PARTITA_DEVICE inline void adam_update(V& weight, V& m, V& v, V stored_grad, const AdamVectors<V>& f) {
    const V grad = V::fma(f.l2, weight, stored_grad * f.grad_scale);
    m = V::fma(f.one_minus_beta1, grad - m, m);
    v = V::fma(f.one_minus_beta2 * grad, grad, f.beta2 * v);
    const V denominator = V::fma(v.sqrt(), f.inverse_sqrt_correction2, f.eps);
    weight = weight * f.keep - f.step_size * m / denominator;
}

}  // namespace partita
