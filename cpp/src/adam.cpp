#include "partita/adam.h"

#include <cmath>
#include <stdexcept>
#include <string>

#include "parallel.h"
#include "simd/kernels.h"

namespace partita {
namespace {

AdamFactors factors_of(const AdamGroup& group, const StepControl& control) {
    const double step = static_cast<double>(control.step);
    const double correction1 = 1.0 - std::pow(group.beta1, step);
    const double correction2 = 1.0 - std::pow(group.beta2, step);
    AdamFactors f{};
    f.grad_scale = control.grad_scale;
    f.l2 = static_cast<float>(group.decoupled ? 0.0 : group.weight_decay);
    f.keep = static_cast<float>(group.decoupled ? 1.0 - group.lr * group.weight_decay : 1.0);
    f.one_minus_beta1 = static_cast<float>(1.0 - group.beta1);
    f.beta2 = static_cast<float>(group.beta2);
    f.one_minus_beta2 = static_cast<float>(1.0 - group.beta2);
    f.inverse_sqrt_correction2 = static_cast<float>(1.0 / std::sqrt(correction2));
    f.eps = static_cast<float>(group.eps);
    f.step_size = static_cast<float>(group.lr / correction1);
    return f;
}

void check(const AdamBuffers& b, const Segments& segments, std::size_t groups) {
    for (const Span* s : {&b.master, &b.exp_avg, &b.exp_avg_sq}) {
        if (s->dtype != DType::f32) throw std::invalid_argument("adam: master weights and moments must be f32");
    }
    const std::int64_t numel = b.master.numel;
    if (b.grads.numel != numel || b.exp_avg.numel != numel || b.exp_avg_sq.numel != numel ||
        (b.params.data != nullptr && b.params.numel != numel) || segments.end() > numel) {
        throw std::invalid_argument("adam: buffers or segments differ in size from the master weights (" +
                                    std::to_string(numel) + " elements)");
    }
    if (static_cast<std::size_t>(segments.groups()) > groups) {
        throw std::invalid_argument("adam: segments name group " + std::to_string(segments.groups() - 1) + " of " +
                                    std::to_string(groups));
    }
}

}  // namespace

void adam(const AdamBuffers& buffers, const Segments& segments, const std::vector<AdamGroup>& groups,
          const StepControl* control, int threads) {
    check(buffers, segments, groups.size());
    if (control->skip != 0) return;
    if (control->step < 1) throw std::invalid_argument("adam: steps count from 1");
    std::vector<AdamFactors> factors;
    for (const AdamGroup& group : groups) factors.push_back(factors_of(group, *control));
    const auto kernel = kernels().adam[index(buffers.grads.dtype)][index(buffers.params.dtype)];
    const auto floats = [](Span span, std::int64_t offset) { return static_cast<float*>(span.data) + offset; };
    const auto& blocks = segments.blocks();
    for_each_block(static_cast<std::int64_t>(blocks.size()), segments.numel(), threads, [&](std::int64_t i) {
        const Segment& block = blocks[static_cast<std::size_t>(i)];
        void* params = buffers.params.data == nullptr ? nullptr : buffers.params.part(block.offset, block.numel).data;
        kernel({buffers.grads.part(block.offset, block.numel).data, floats(buffers.master, block.offset),
                floats(buffers.exp_avg, block.offset), floats(buffers.exp_avg_sq, block.offset), params, block.numel},
               factors[static_cast<std::size_t>(block.group)]);
    });
}

}  // namespace partita
