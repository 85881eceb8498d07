#include "fibers.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_emulator {
namespace {

constexpr std::size_t stack_bytes = 256 * 1024;

// An execution with a stack of its own, waiting for the next switch to it. Switches are jumps: swapcontext() would
// make two system calls for each.
struct Fiber {
    ucontext_t start{};
    void* jump[5];  // as __builtin_setjmp() wants it
    bool has_jump = false;
    const void* stack = nullptr;
    std::size_t bytes = 0;
    void* sanitizer = nullptr;

    void switch_to(Fiber& other) {
#ifdef __SANITIZE_ADDRESS__
        __sanitizer_start_switch_fiber(&sanitizer, other.stack, other.bytes);
#endif
        has_jump = true;
        if (__builtin_setjmp(jump) == 0) other.go_on();
        arrived_from(other);
    }
    void arrived_from([[maybe_unused]] Fiber& other) {
#ifdef __SANITIZE_ADDRESS__
        __sanitizer_finish_switch_fiber(sanitizer, &other.stack, &other.bytes);
#endif
    }

  private:
    // Before leaving a function for good the sanitizer would forget the stack, which here is still in use.
    __attribute__((noinline, no_sanitize_address)) void go_on() {
        if (has_jump) __builtin_longjmp(jump, 1);
        setcontext(&start);
    }
};

std::deque<Fiber> fibers;
Fiber scheduler;           // what called run_block()
Fiber* current = nullptr;  // the fiber that runs
std::vector<Fiber*> idle;  // fibers outlive blocks and wait for the next one

void fiber_main();

Fiber* idle_fiber() {
    if (idle.empty()) {
        const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
        void* memory = mmap(nullptr, page + stack_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        Fiber* fiber = &fibers.emplace_back();
        fiber->stack = static_cast<char*>(memory) + page;  // beyond a page that stops an overflow
        fiber->bytes = stack_bytes;
        if (mprotect(static_cast<char*>(memory) + page, stack_bytes, PROT_READ | PROT_WRITE) != 0)
            throw std::bad_alloc();
        getcontext(&fiber->start);
        fiber->start.uc_stack.ss_sp = static_cast<char*>(memory) + page;
        fiber->start.uc_stack.ss_size = stack_bytes;
        makecontext(&fiber->start, fiber_main, 0);
        idle.push_back(fiber);
    }
    Fiber* fiber = idle.back();
    idle.pop_back();
    return fiber;
}

enum class State { ready, at_barrier, at_exchange, done };  // ready: also the one that runs

struct Thread {
    State state = State::ready;
    Fiber* fiber = nullptr;
    unsigned exchanges = 0;
    unsigned char values[2][8] = {};  // in turn: a thread may be one exchange ahead of the others of its warp
};

struct Warp {
    std::vector<int> order;  // of its threads
    std::size_t at_exchange = 0;
};

class Block {
  public:
    Block(const std::vector<int>& order, const std::function<void(int)>& enter, const std::function<void()>& body)
        : order_(order),
          enter_(enter),
          body_(body),
          threads_(order.size()),
          warps_((order.size() + warp_size - 1) / warp_size) {
        for (const int i : order) warps_[static_cast<std::size_t>(i / warp_size)].order.push_back(i);
        make_ready(order_);
    }

    void run() {
        while (!ready_.empty()) {
            const Thread& next = threads_[static_cast<std::size_t>(ready_.back())];
            if (next.fiber == nullptr) {
                resume(idle_fiber());
            } else {
                become_next();
                resume(next.fiber);
            }
            if (ready_.empty()) pass_barrier();
        }
    }

    // On a fiber: runs threads that have not started, one after the other as long as none waits.
    void work() {
        while (!ready_.empty() && threads_[static_cast<std::size_t>(ready_.back())].fiber == nullptr) {
            become_next();
            thread().fiber = current;
            body_();
            thread().state = State::done;
        }
    }

    void wait_for_block() {
        thread().state = State::at_barrier;
        thread().fiber->switch_to(scheduler);
    }

    // A complete warp goes on at once and as far as it can, before all others.
    void wait_for_warp() {
        thread().state = State::at_exchange;
        Fiber* fiber = thread().fiber;
        Warp& warp = warps_[static_cast<std::size_t>(index_ / warp_size)];
        if (++warp.at_exchange == warp.order.size()) {
            warp.at_exchange = 0;
            make_ready(warp.order);
        }
        fiber->switch_to(scheduler);
    }

    Thread& thread() { return threads_[static_cast<std::size_t>(index_)]; }
    int lane() const { return index_ % warp_size; }
    Thread& thread_of_lane(int lane) {
        const auto i = static_cast<std::size_t>(index_ / warp_size * warp_size + lane);
        if (lane < 0 || lane >= warp_size || i >= threads_.size()) fail("a shuffle reads a lane that does not exist");
        return threads_[i];
    }

  private:
    int size() const { return static_cast<int>(threads_.size()); }

    void resume(Fiber* fiber) {
        current = fiber;
        scheduler.switch_to(*fiber);
    }
    void become_next() {
        index_ = ready_.back();
        ready_.pop_back();
        enter_(index_);
    }

    // These threads are the next ones, in this order.
    void make_ready(const std::vector<int>& order) {
        for (const int i : order) threads_[static_cast<std::size_t>(i)].state = State::ready;
        ready_.insert(ready_.end(), order.rbegin(), order.rend());
    }

    // When none can go on: all are done, or all are at the barrier.
    void pass_barrier() {
        const int waiting = count(State::at_barrier);
        if (count(State::at_exchange) > 0) fail("only a part of a warp reaches a shuffle");
        if (waiting > 0 && waiting < size()) fail("only a part of the block reaches __syncthreads");
        if (waiting > 0) make_ready(order_);
    }
    int count(State state) const {
        return static_cast<int>(
            std::count_if(threads_.begin(), threads_.end(), [state](const Thread& t) { return t.state == state; }));
    }

    [[noreturn]] static void fail(const char* what) {
        std::fprintf(stderr, "cuda_emulator: %s\n", what);
        std::abort();
    }

    const std::vector<int>& order_;
    const std::function<void(int)>& enter_;
    const std::function<void()>& body_;
    std::vector<Thread> threads_;
    std::vector<Warp> warps_;
    std::vector<int> ready_;  // the next one is the last
    int index_ = 0;
};

Block* block = nullptr;  // the one that runs

void fiber_main() {
    current->arrived_from(scheduler);
    for (;;) {
        block->work();
        idle.push_back(current);
        current->switch_to(scheduler);
    }
}

}  // namespace

void run_block(const std::vector<int>& order, const std::function<void(int)>& enter,
               const std::function<void()>& body) {
    Block this_block(order, enter, body);
    block = &this_block;
    this_block.run();
    block = nullptr;
}

void block_barrier() { block->wait_for_block(); }

void warp_exchange(void* value, std::size_t bytes, int lane) {
    const unsigned turn = block->thread().exchanges++ % 2;
    std::memcpy(block->thread().values[turn], value, bytes);
    block->wait_for_warp();
    std::memcpy(value, block->thread_of_lane(lane).values[turn], bytes);
}

int own_lane() { return block->lane(); }

}  // namespace cuda_emulator
