#include <stdexcept>
#include <string>
#include <vector>

#include "adam_update.h"
#include "checks.h"
#include "parallel.h"
#include "simd/kernels.h"

namespace partita {
namespace {

void check(const AdamBuffers& b, const Segments& segments, std::size_t groups) {
    const bool split = b.remainder != nullptr;
    for (const Span* s : {&b.master, &b.exp_avg, &b.exp_avg_sq}) {
        if (s->dtype != DType::f32) throw std::invalid_argument("adam: master weights and moments must be f32");
    }
    if (split && (b.master.data != nullptr || b.params.dtype != DType::bf16)) {
        throw std::invalid_argument("adam: a remainder takes the place of master weights and needs bf16 params");
    }
    const std::int64_t numel = b.exp_avg.numel;
    if (numel > 0 && (split ? b.params : b.master).data == nullptr) {
        throw std::invalid_argument("adam: neither master weights nor bf16 params with a remainder");
    }
    if (b.grads.numel != numel || (!split && b.master.numel != numel) || b.exp_avg_sq.numel != numel ||
        ((split || b.params.data != nullptr) && b.params.numel != numel) || segments.end() > numel) {
        throw std::invalid_argument("adam: buffers or segments differ in size from the first moment (" +
                                    std::to_string(numel) + " elements)");
    }
    if (static_cast<std::size_t>(segments.groups()) > groups) {
        throw std::invalid_argument("adam: segments name group " + std::to_string(segments.groups() - 1) + " of " +
                                    std::to_string(groups));
    }
}

void update(const AdamBuffers& buffers, const Segments& segments, const std::vector<AdamFactors>& factors,
            int threads) {
    const bool split = buffers.remainder != nullptr;
    const auto kernel = split ? kernels().split_adam[index(buffers.grads.dtype)]
                              : kernels().adam[index(buffers.grads.dtype)][index(buffers.params.dtype)];
    const auto floats = [](Span span, std::int64_t offset) {
        return span.data == nullptr ? nullptr : static_cast<float*>(span.data) + offset;
    };
    const auto& blocks = segments.blocks();
    for_each_block(static_cast<std::int64_t>(blocks.size()), segments.numel(), threads, [&](std::int64_t i) {
        const Segment& block = blocks[static_cast<std::size_t>(i)];
        void* params = buffers.params.data == nullptr ? nullptr : buffers.params.part(block.offset, block.numel).data;
        std::uint16_t* remainder = split ? buffers.remainder + block.offset : nullptr;
        kernel({buffers.grads.part(block.offset, block.numel).data, floats(buffers.master, block.offset),
                floats(buffers.exp_avg, block.offset), floats(buffers.exp_avg_sq, block.offset), params, remainder,
                block.numel},
               factors[static_cast<std::size_t>(block.group)]);
    });
}

}  // namespace

void check(const std::vector<AdamPart>& parts, std::size_t groups) {
    for (const AdamPart& part : parts) check(part.buffers, *part.segments, groups);
}

void adam(const std::vector<AdamPart>& parts, const std::vector<AdamGroup>& groups, const StepControl* control,
          int threads) {
    check(parts, groups.size());
    if (control->skip != 0) return;
    for (const AdamGroup& group : groups) {
        if (control->step - group.waited < 1) throw std::invalid_argument("adam: steps count from 1");
    }
    std::vector<AdamFactors> factors;
    for (const AdamGroup& group : groups) factors.push_back(adam_factors(group, *control));
    for (const AdamPart& part : parts) update(part.buffers, *part.segments, factors, threads);
}

}  // namespace partita
