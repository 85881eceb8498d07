#include "partita/copy.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "parallel.h"
#include "simd/kernels.h"

namespace partita {
namespace {

constexpr std::int64_t block_numel = 1 << 16;

// One contiguous piece of work; `from.data` may be null, which stands for zeros.
struct Piece {
    Span to;
    Span from;
};

void run_piece(const Piece& piece, float scale, bool accumulate) {
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

class Work {
  public:
    void add(Span to, Span from) {
        for (std::int64_t done = 0; done < to.numel; done += block_numel) {
            const std::int64_t count = std::min(block_numel, to.numel - done);
            pieces_.push_back({to.part(done, count),
                               from.data == nullptr ? Span{nullptr, count, from.dtype} : from.part(done, count)});
        }
        numel_ += to.numel;
    }

    void run(float scale, bool accumulate, int threads) const {
        for_each_block(static_cast<std::int64_t>(pieces_.size()), numel_, threads,
                       [&](std::int64_t i) { run_piece(pieces_[static_cast<std::size_t>(i)], scale, accumulate); });
    }

  private:
    std::vector<Piece> pieces_;
    std::int64_t numel_ = 0;
};

void check_inside(const char* what, std::size_t i, std::int64_t offset, std::int64_t numel, std::int64_t flat_numel) {
    if (offset < 0 || numel < 0 || offset > flat_numel - numel) {
        throw std::invalid_argument(std::string(what) + " " + std::to_string(i) + " (offset " + std::to_string(offset) +
                                    ", numel " + std::to_string(numel) + ") does not fit into a flat buffer of " +
                                    std::to_string(flat_numel) + " elements");
    }
}

void check_counts(std::size_t spans, std::size_t offsets) {
    if (spans != offsets) {
        throw std::invalid_argument(std::to_string(spans) + " spans but " + std::to_string(offsets) + " offsets");
    }
}

}  // namespace

void pack(Span destination, const std::vector<Span>& sources, const std::vector<std::int64_t>& offsets, float scale,
          bool accumulate, int threads) {
    check_counts(sources.size(), offsets.size());
    Work work;
    for (std::size_t i = 0; i < sources.size(); ++i) {
        check_inside("source", i, offsets[i], sources[i].numel, destination.numel);
        work.add(destination.part(offsets[i], sources[i].numel), sources[i]);
    }
    work.run(scale, accumulate, threads);
}

void unpack(Span source, const std::vector<Span>& destinations, const std::vector<std::int64_t>& offsets, float scale,
            bool accumulate, int threads) {
    check_counts(destinations.size(), offsets.size());
    Work work;
    for (std::size_t i = 0; i < destinations.size(); ++i) {
        check_inside("destination", i, offsets[i], destinations[i].numel, source.numel);
        const Span none{nullptr, destinations[i].numel, source.dtype};
        work.add(destinations[i], source.data == nullptr ? none : source.part(offsets[i], destinations[i].numel));
    }
    work.run(scale, accumulate, threads);
}

void cast(Span destination, Span source, float scale, bool accumulate, int threads) {
    if (destination.numel != source.numel) {
        throw std::invalid_argument("cast from " + std::to_string(source.numel) + " to " +
                                    std::to_string(destination.numel) + " elements");
    }
    Work work;
    work.add(destination, source);
    work.run(scale, accumulate, threads);
}

}  // namespace partita
