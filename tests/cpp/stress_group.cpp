// Random collectives on forked ranks, compared bit for bit, and ranks killed at random moments.
//
//     partita_stress [collectives] [kills] [seed]
#include <cstdio>
#include <cstdlib>
#include <deque>

#include "group_support.h"
#include "rank_processes.h"

namespace partita {
namespace {

constexpr int world_sizes[] = {2, 3, 4};

// The number-th collective of all ranks: mostly small, now and then up to 200,000 elements.
struct Step {
    Request request;
    Place place;
    std::uint64_t seed;
    bool dropped;        // nobody waits for it
    unsigned in_flight;  // how many may be waiting from now on
};

class Steps {
  public:
    Steps(std::uint32_t seed, int world_size)
        : random_(seed), world_size_(static_cast<unsigned>(world_size)), seed_(std::uint64_t{seed} << 32) {}

    Step next() {
        Step step{};
        Request& request = step.request;
        request.collective = static_cast<Collective>(random_.bits() % 5);
        const bool moves_only =
            request.collective == Collective::all_gather || request.collective == Collective::broadcast;
        request.element = all_elements[random_.bits() % (moves_only ? 5 : 4)];
        request.reduction = static_cast<Reduction>(random_.bits() % 3);
        request.root = static_cast<std::int32_t>(random_.bits() % world_size_);
        constexpr unsigned limits[] = {20, 300, 2000, 5000};
        const unsigned limit = random_.bits() % 25 == 0 ? 200001 : limits[random_.bits() % 4];
        request.numel = random_.bits() % limit;
        if (request.collective != Collective::all_reduce) request.numel -= request.numel % world_size_;
        if (request.collective == Collective::barrier) request = {};
        step.place = all_places[random_.bits() % 4];
        step.seed = ++seed_;
        step.dropped = random_.bits() % 16 == 0;
        if (random_.bits() % 50 == 0) in_flight_ = random_.bits() % 4 == 0 ? random_.bits() % 100 : random_.bits() % 5;
        step.in_flight = in_flight_;
        return step;
    }

  private:
    Random random_;
    unsigned world_size_;
    std::uint64_t seed_;
    unsigned in_flight_ = 0;
};

// The sums by the core's own reduce(), which is fast, and which test_reduce.cpp holds to a plain loop.
Bytes fast_result(const Request& request, const std::vector<Bytes>& values, int rank) {
    return result_of(request, values, rank, [&](char* to, std::int64_t begin, std::int64_t end) {
        const std::int64_t offset = begin * size_of(request.element);
        std::vector<const void*> sources;
        for (const Bytes& bytes : values) sources.push_back(bytes.data() + offset);
        const int count = static_cast<int>(values.size());
        if (request.element == Element::f64) {
            const std::vector<const double*> doubles = [&] {
                std::vector<const double*> result;
                for (const void* source : sources) result.push_back(static_cast<const double*>(source));
                return result;
            }();
            return reduce(reinterpret_cast<double*>(to + offset), doubles.data(), count, end - begin,
                          request.reduction);
        }
        const DType dtype = request.element == Element::f32   ? DType::f32
                            : request.element == Element::f16 ? DType::f16
                                                              : DType::bf16;
        reduce({to + offset, end - begin, dtype}, sources.data(), count, request.reduction, 1);
    });
}

struct InFlight {
    Step step;
    std::unique_ptr<CollectiveBuffer> buffer;
    std::shared_ptr<Operation> operation;
};

void finish(Group& group, InFlight& one) {
    if (one.step.dropped) return;
    group.wait(*one.operation);
    const std::vector<Bytes> values = all_values(one.step.request, group.world_size(), one.step.seed);
    require(one.buffer->holds(fast_result(one.step.request, values, group.rank())), describe(one.step.request));
}

void random_collectives(Group& group, long count, std::uint32_t seed) {
    Steps steps(seed, group.world_size());
    Random own(seed + 1 + static_cast<std::uint32_t>(group.rank()));  // each rank waits in its own order
    std::deque<InFlight> in_flight;
    for (long i = 0; i < count || !in_flight.empty(); ++i) {
        if (i < count) {
            const Step step = steps.next();
            const Bytes values = values_of(step.request, group.rank(), step.seed);
            auto buffer = std::make_unique<CollectiveBuffer>(group, step.request, values, step.place);
            auto operation = group.launch(step.request, buffer->data());
            if (step.dropped) continue;
            in_flight.push_back({step, std::move(buffer), std::move(operation)});
            if (in_flight.size() <= step.in_flight) continue;
        }
        do {
            const auto chosen = in_flight.begin() + static_cast<std::ptrdiff_t>(own.bits() % in_flight.size());
            finish(group, *chosen);
            in_flight.erase(chosen);
        } while (!in_flight.empty() && own.bits() % 4 != 0);
    }
    group.barrier();
}

int failures = 0;

void expect_empty(const std::string& report) {
    if (report.empty()) return;
    ++failures;
    std::printf("FAILED: %s\n", report.c_str());
}

void run_collectives(int world_size, long count, std::uint32_t seed) {
    const auto took = duration_of([&] {
        RankProcesses ranks(world_size, [&](int, Group& group) { random_collectives(group, count, seed); }, {}, 60s);
        for (int r = 0; r < world_size; ++r) expect_empty(ranks.report_of(r, 600s));
    });
    std::printf("%ld collectives on %d ranks: %.1f s\n", count, world_size, static_cast<double>(took.count()) / 1000);
    std::fflush(stdout);
}

// Kills one rank at a random moment; the others must be told within two seconds, and by name.
void run_kill(int round, std::uint32_t seed) {
    Random random(seed + static_cast<std::uint32_t>(round));
    const int world_size = world_sizes[round % 3];
    const int victim = static_cast<int>(random.bits() % static_cast<unsigned>(world_size));
    const bool while_joining = round % 8 == 0;
    const auto delay = std::chrono::microseconds(random.bits() % (while_joining ? 3000 : 30000));
    Forked ranks(world_size, [&](int rank, const Pipes& pipes) {
        const Listener listener;
        const auto addresses = pipes.exchange(listener.address());
        const auto join_timeout = while_joining ? 300ms : 10s;
        Group group(join(listener, rank, addresses, test_token, arena_bytes, join_timeout), 60s, 1);
        group.barrier();
        pipes.say("joined");
        const std::string text = error_of([&] { random_collectives(group, 1000000000, seed); });
        require(contains(text, {"rank " + std::to_string(victim)}), "the error");
    });
    ranks.relay();
    for (int r = 0; r < world_size && !while_joining; ++r) require_true(ranks.hear(r) == "joined", "a rank failed");
    std::this_thread::sleep_for(delay);
    kill(ranks.pid(victim), SIGKILL);
    const auto took = duration_of([&] {
        for (int r = 0; r < world_size; ++r) {
            if (r == victim) {
                ranks.await_exit(r);
            } else if (const std::string report = ranks.report_of(r, 15s); !while_joining) {
                expect_empty(report);
            }
        }
    });
    if (took > 2s && !while_joining) expect_empty("the others took " + std::to_string(took.count()) + " ms");
}

int run(long collectives, int kills, std::uint32_t seed) {
    for (const int world_size : world_sizes) run_collectives(world_size, collectives, seed);
    const auto took = duration_of([&] {
        for (int round = 0; round < kills; ++round) run_kill(round, seed);
    });
    std::printf("%d kills: %.1f s\n", kills, static_cast<double>(took.count()) / 1000);
    std::printf(failures == 0 ? "passed\n" : "%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace partita

int main(int argc, char** argv) {
    const long collectives = argc > 1 ? std::atol(argv[1]) : 1000;
    const int kills = argc > 2 ? std::atoi(argv[2]) : 10;
    const auto seed = static_cast<std::uint32_t>(argc > 3 ? std::atol(argv[3]) : 1);
    return partita::run(collectives, kills, seed);
}
