// What the tests of groups share: values that any rank can work out for all ranks, the results that a collective must
// give, and a group whose ranks are threads of this process.
#pragma once

#include <unistd.h>

#include <chrono>
#include <functional>
#include <memory>
#include <thread>

#include "partita/shared_memory/group.h"
#include "shared_memory/control.h"
#include "support.h"

namespace partita {

using Bytes = std::vector<char>;
using namespace std::chrono_literals;

inline constexpr Element all_elements[] = {Element::f32, Element::f16, Element::bf16, Element::f64, Element::byte};

// Elements, well above what travels in a slot.
#ifdef __SANITIZE_THREAD__
inline constexpr std::int64_t large = 20000;
#else
inline constexpr std::int64_t large = 100000;
#endif
// `numel` random values; floats have all their fraction bits and sizes from 0.5 to 1, so that the order of a sum shows.
inline void fill_values(char* to, Element element, std::int64_t numel, std::uint64_t seed) {
    const auto [keep, set] = [&]() -> std::pair<std::uint64_t, std::uint64_t> {
        switch (element) {
            case Element::f32:
                return {0x807fffff807fffff, 0x3f0000003f000000};
            case Element::f16:
                return {0x83ff83ff83ff83ff, 0x3800380038003800};
            case Element::bf16:
                return {0x807f807f807f807f, 0x3f003f003f003f00};
            case Element::f64:
                return {0x800fffffffffffff, 0x3fe0000000000000};
            default:
                return {~std::uint64_t{0}, 0};
        }
    }();
    const std::int64_t bytes = numel * size_of(element);
    for (std::int64_t i = 0; i < bytes; i += 8) {
        std::uint64_t word = (seed + static_cast<std::uint64_t>(i)) * 0x9e3779b97f4a7c15;  // splitmix64
        word = (word ^ (word >> 30)) * 0xbf58476d1ce4e5b9;
        word = (word ^ (word >> 27)) * 0x94d049bb133111eb;
        word = ((word ^ (word >> 31)) & keep) | set;
        std::memcpy(to + i, &word, static_cast<std::size_t>(std::min<std::int64_t>(8, bytes - i)));
    }
}

// What `rank` brings into collective number `seed`.
inline Bytes values_of(const Request& request, int rank, std::uint64_t seed) {
    Bytes values(static_cast<std::size_t>(request.bytes()));
    fill_values(values.data(), request.element, request.numel, (seed * 16 + static_cast<std::uint64_t>(rank)) << 32);
    return values;
}

// Element i of the reduction over all ranks' values, in rank order: fp32 rounded once, or fp64.
inline void reduce_element(char* to, const std::vector<Bytes>& values, const Request& request, std::int64_t i) {
    const std::int64_t size = size_of(request.element);
    const auto combine = [&](auto decode) {
        auto total = decode(values[0].data() + i * size);
        for (std::size_t r = 1; r < values.size(); ++r) {
            const auto value = decode(values[r].data() + i * size);
            total = request.reduction == Reduction::max ? std::max(total, value) : total + value;
        }
        return total;
    };
    if (request.element == Element::f64) {
        double total = combine([](const char* from) {
            double value;
            std::memcpy(&value, from, sizeof value);
            return value;
        });
        if (request.reduction == Reduction::average) total /= static_cast<double>(values.size());
        std::memcpy(to + i * size, &total, sizeof total);
        return;
    }
    const DType dtype = request.element == Element::f32   ? DType::f32
                        : request.element == Element::f16 ? DType::f16
                                                          : DType::bf16;
    float total = combine([&](const char* from) {
        std::uint32_t bits = 0;
        std::memcpy(&bits, from, static_cast<std::size_t>(size));
        return decode(dtype, bits);
    });
    if (request.reduction == Reduction::average) total *= 1.0f / static_cast<float>(values.size());
    const std::uint32_t bits = encode(dtype, total);
    std::memcpy(to + i * size, &bits, static_cast<std::size_t>(size));
}

// The whole buffer of `rank` after the collective, given all ranks' buffers before it. `reduce` writes elements
// [begin, end) of the reduction to a buffer.
template <class Reduce>
Bytes result_of(const Request& request, const std::vector<Bytes>& values, int rank, const Reduce& reduce) {
    Bytes result = values[static_cast<std::size_t>(rank)];
    const auto world_size = static_cast<std::int64_t>(values.size());
    const std::int64_t slice = request.numel / world_size, slice_bytes = slice * size_of(request.element);
    switch (request.collective) {
        case Collective::barrier:
            break;
        case Collective::all_reduce:
            reduce(result.data(), 0, request.numel);
            break;
        case Collective::reduce_scatter:
            reduce(result.data(), rank * slice, (rank + 1) * slice);
            break;
        case Collective::all_gather:
            for (std::int64_t r = 0; r < world_size; ++r) {
                const char* from = values[static_cast<std::size_t>(r)].data() + r * slice_bytes;
                std::copy(from, from + slice_bytes, result.data() + r * slice_bytes);
            }
            break;
        case Collective::broadcast:
            result = values[static_cast<std::size_t>(request.root)];
            break;
    }
    return result;
}

// By plain loops, which share nothing with the core.
inline Bytes plain_result(const Request& request, const std::vector<Bytes>& values, int rank) {
    return result_of(request, values, rank, [&](char* to, std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) reduce_element(to, values, request, i);
    });
}

inline std::vector<Bytes> all_values(const Request& request, int world_size, std::uint64_t seed) {
    std::vector<Bytes> values;
    for (int r = 0; r < world_size; ++r) values.push_back(values_of(request, r, seed));
    return values;
}

enum class Place { in_place, in_place_odd, foreign, foreign_odd };  // odd: begins one element into the memory
inline constexpr Place all_places[] = {Place::in_place, Place::in_place_odd, Place::foreign, Place::foreign_odd};

// One rank's buffer for one collective, with a guard in front and behind.
class CollectiveBuffer {
  public:
    CollectiveBuffer(Group& group, const Request& request, const Bytes& values, Place place) {
        const bool odd = place == Place::in_place_odd || place == Place::foreign_odd;
        front_ = odd ? static_cast<std::size_t>(size_of(request.element)) : 0;
        numel_bytes_ = values.size();
        const std::size_t bytes = front_ + numel_bytes_ + guard_bytes;
        if (place == Place::foreign || place == Place::foreign_odd) {
            foreign_.resize(bytes);
            begin_ = foreign_.data();
        } else {
            shared_ = group.allocate(static_cast<std::int64_t>(bytes));
            begin_ = shared_->data();
        }
        std::fill(begin_, begin_ + bytes, guard);
        std::copy(values.begin(), values.end(), data());
    }

    char* data() { return begin_ + front_; }

    ::testing::AssertionResult holds(const Bytes& expected) {
        const auto wrong = std::mismatch(expected.begin(), expected.end(), data()).first;
        if (wrong != expected.end()) {
            return ::testing::AssertionFailure() << "byte " << wrong - expected.begin() << " of " << expected.size();
        }
        const auto is_guard = [](char c) { return c == guard; };
        const bool untouched = std::all_of(begin_, begin_ + front_, is_guard) &&
                               std::all_of(data() + numel_bytes_, data() + numel_bytes_ + guard_bytes, is_guard);
        if (!untouched) return ::testing::AssertionFailure() << "written outside of the buffer";
        return ::testing::AssertionSuccess();
    }

  private:
    static constexpr char guard = '\x5a';
    static constexpr std::size_t guard_bytes = 64;
    std::size_t front_ = 0, numel_bytes_ = 0;
    Bytes foreign_;
    std::shared_ptr<Allocation> shared_;
    char* begin_ = nullptr;
};

// A group whose ranks are threads that see the very same memory, so that the thread sanitizer sees all they do.
class ThreadRanks {
  public:
    // `is_interrupted`: makes what a rank's group asks; empty: no rank is ever interrupted.
    explicit ThreadRanks(int world_size, std::chrono::milliseconds timeout = 20s, std::int64_t arena_bytes = 64 << 20,
                         const std::function<std::function<bool()>(int rank)>& is_interrupted = {}) {
        const auto memory = anonymous_memory(Control::bytes(world_size));
        const auto control =
            std::make_shared<Mapping>(memory.get(), Control::bytes(world_size), Mapping::Access::read_write);
        std::vector<Member> members;
        for (int r = 0; r < world_size; ++r) {
            arenas_.push_back(Arena::create(arena_bytes));
            members.push_back({getpid(), arenas_.back()->mapping()});
        }
        for (int r = 0; r < world_size; ++r) {
            const Membership membership{r, arenas_[static_cast<std::size_t>(r)], control, members};
            const auto ask = is_interrupted ? is_interrupted(r) : std::function<bool()>();
            groups_.push_back(std::make_unique<Group>(membership, timeout, 1, ask));
        }
    }

    int world_size() const { return static_cast<int>(groups_.size()); }
    Group& group(int rank) { return *groups_[static_cast<std::size_t>(rank)]; }
    void destroy(int rank) { groups_[static_cast<std::size_t>(rank)] = nullptr; }

    // Runs the body as every rank at once. Returns by rank the text of the CommunicationError that it threw, if any.
    std::vector<std::string> errors_of(const std::function<void(int rank, Group&)>& body) {
        std::vector<std::string> errors(groups_.size());
        std::vector<std::thread> threads;
        for (int r = 0; r < world_size(); ++r) {
            threads.emplace_back([&, r] {
                try {
                    body(r, group(r));
                } catch (const CommunicationError& error) {
                    errors[static_cast<std::size_t>(r)] = error.what();
                }
            });
        }
        for (std::thread& thread : threads) thread.join();
        return errors;
    }

    // The same for a body that does not fail.
    void run(const std::function<void(int rank, Group&)>& body) {
        for (const std::string& error : errors_of(body)) EXPECT_EQ(error, "");
    }

  private:
    std::vector<std::shared_ptr<Arena>> arenas_;
    std::vector<std::unique_ptr<Group>> groups_;
};

inline ::testing::AssertionResult contains(const std::string& text, const std::vector<std::string>& parts) {
    for (const std::string& part : parts) {
        if (text.find(part) == std::string::npos) {
            return ::testing::AssertionFailure() << "no '" << part << "' in '" << text << "'";
        }
    }
    return ::testing::AssertionSuccess();
}

// Calls the body and returns the text of the CommunicationError that it throws; empty if it throws none.
template <class Body>
std::string error_of(const Body& body) {
    try {
        body();
    } catch (const CommunicationError& error) {
        return error.what();
    }
    return "";
}

template <class Body>
std::chrono::milliseconds duration_of(const Body& body) {
    const auto begin = std::chrono::steady_clock::now();
    body();
    return std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - begin);
}

inline Request all_reduce_of(std::int64_t numel, Element element = Element::f32, Reduction reduction = Reduction::sum) {
    return {Collective::all_reduce, element, reduction, 0, numel};
}

// For values_of(): what is sent is a plain buffer.
inline Request message_of(Element element, std::int64_t numel) {
    return {Collective::broadcast, element, Reduction::sum, 0, numel};
}

}  // namespace partita
