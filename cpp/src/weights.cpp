#include "partita/weights.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "checks.h"
#include "parallel.h"
#include "simd/kernels.h"

namespace partita {
namespace {

constexpr std::int64_t block_numel = 1 << 16;

void check_masters(const char* function, Span master, Span params) {
    if (master.dtype != DType::f32) {
        throw std::invalid_argument(std::string(function) + ": master weights must be f32");
    }
    if (params.numel != master.numel) {
        throw std::invalid_argument(std::string(function) + ": " + std::to_string(params.numel) + " parameters but " +
                                    std::to_string(master.numel) + " master weights");
    }
}

template <class Body>
void for_each_part(std::int64_t numel, int threads, const Body& body) {
    for_each_block((numel + block_numel - 1) / block_numel, numel, threads,
                   [&](std::int64_t i) { body(i * block_numel, std::min(block_numel, numel - i * block_numel)); });
}

}  // namespace

void check_split(Span params, const std::uint16_t* remainder, Span master) {
    check_masters("split_master", master, params);
    if (remainder != nullptr && params.dtype != DType::bf16) {
        throw std::invalid_argument("split_master: only bf16 parameters have a remainder");
    }
}

void check_join(Span master, Span params, const std::uint16_t* remainder) {
    check_masters("join_master", master, params);
    if (params.dtype != DType::bf16 || (remainder == nullptr && master.numel > 0)) {
        throw std::invalid_argument("join_master: master weights come from bf16 parameters and their remainder");
    }
}

void split_master(Span params, std::uint16_t* remainder, Span master, int threads) {
    check_split(params, remainder, master);
    const auto kernel = kernels().split[index(params.dtype)];
    for_each_part(master.numel, threads, [&](std::int64_t begin, std::int64_t count) {
        kernel(params.part(begin, count).data, remainder == nullptr ? nullptr : remainder + begin,
               static_cast<const float*>(master.data) + begin, count);
    });
}

void join_master(Span master, Span params, const std::uint16_t* remainder, int threads) {
    check_join(master, params, remainder);
    for_each_part(master.numel, threads, [&](std::int64_t begin, std::int64_t count) {
        kernels().join(static_cast<float*>(master.data) + begin, params.part(begin, count).data, remainder + begin,
                       count);
    });
}

}  // namespace partita
