#include "partita/copy.h"

#include <algorithm>
#include <cstring>

#include "copy_pairs.h"
#include "parallel.h"
#include "simd/kernels.h"

namespace partita {
namespace {

constexpr std::int64_t block_numel = 1 << 16;

void run_piece(const CopyPair& piece, float scale, bool accumulate) {
    const auto bytes = static_cast<std::size_t>(piece.to.numel * size_of(piece.to.dtype));
    if (piece.from.data == nullptr) {
        if (!accumulate) std::memset(piece.to.data, 0, bytes);
        return;
    }
    if (!accumulate && scale == 1.0f && piece.from.dtype == piece.to.dtype) {
        std::memcpy(piece.to.data, piece.from.data, bytes);
        return;
    }
    const auto& table = accumulate ? kernels().accumulate : kernels().copy;
    table[index(piece.from.dtype)][index(piece.to.dtype)](piece.to.data, piece.from.data, piece.to.numel, scale);
}

void run(const std::vector<CopyPair>& pairs, Scale scale, bool accumulate, int threads) {
    std::vector<CopyPair> pieces;
    std::int64_t numel = 0;
    for (const CopyPair& pair : pairs) {
        for (std::int64_t done = 0; done < pair.to.numel; done += block_numel) {
            const std::int64_t count = std::min(block_numel, pair.to.numel - done);
            const bool zeros = pair.from.data == nullptr;
            pieces.push_back({pair.to.part(done, count),
                              zeros ? Span{nullptr, count, pair.from.dtype} : pair.from.part(done, count)});
        }
        numel += pair.to.numel;
    }
    const float factor = product(scale);
    for_each_block(static_cast<std::int64_t>(pieces.size()), numel, threads,
                   [&](std::int64_t i) { run_piece(pieces[static_cast<std::size_t>(i)], factor, accumulate); });
}

}  // namespace

void pack(Span destination, const std::vector<Span>& sources, const std::vector<std::int64_t>& offsets, Scale scale,
          bool accumulate, int threads) {
    run(pack_pairs(destination, sources, offsets), scale, accumulate, threads);
}

void cast(Span destination, Span source, Scale scale, bool accumulate, int threads) {
    run(cast_pairs(destination, source), scale, accumulate, threads);
}

}  // namespace partita
