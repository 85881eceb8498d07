#include "partita/shared_memory/group.h"

#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>

#include "shared_memory/channels.h"
#include "shared_memory/collectives.h"

namespace partita {
namespace {

constexpr std::size_t idle_staging_buffers = 2;
constexpr std::int64_t most_idle_staging_bytes = 64 << 20;  // each
// Peers depend on what this rank does in a large collective, also while its caller computes. A small one they have
// already: who waits does the rest.
bool wants_thread(const Operation& operation) { return !operation.is_small(); }

}  // namespace

// The queue of launched collectives and who works on it.
class Group::State {
  public:
    State(Membership membership, std::chrono::milliseconds timeout, int threads, IsInterrupted is_interrupted)
        : membership_(std::move(membership)),
          peers_(Control(membership_.control->data(), membership_.world_size()), membership_.rank, membership_.members,
                 timeout, std::move(is_interrupted)),
          collectives_(peers_, membership_.members, threads),
          channels_(peers_, membership_.arena, membership_.members),
          thread_([this] { communicate(); }) {}

    ~State() { close(""); }

    std::shared_ptr<Operation> launch(const Request& request, void* data, std::string call);
    void wait(Operation& operation);
    void close(const std::string& reason);

    const Membership& membership() const { return membership_; }
    Channels& channels() { return channels_; }
    Peers& peers() { return peers_; }

  private:
    void communicate();
    std::int64_t place(Operation& operation);
    void run_or_wait(std::unique_lock<std::mutex>& lock, const Operation& waited_for);
    void run_next(std::unique_lock<std::mutex>& lock);
    void deliver(Operation& operation);
    void forget_finished();
    std::shared_ptr<Allocation> take_staging(std::int64_t bytes);
    void keep_staging(std::shared_ptr<Allocation> staging);

    Membership membership_;
    Peers peers_;
    Collectives collectives_;
    Channels channels_;

    std::mutex closing_mutex_;      // one close at a time
    std::mutex launching_;          // one launch at a time: numbers are announced in order
    std::mutex mutex_;              // of what follows
    std::condition_variable work_;  // for the communication thread: there is a collective for it, or the end
    std::condition_variable done_;  // for those who wait: nobody executes now
    std::deque<std::shared_ptr<Operation>> queue_;     // launched, to be executed in order
    std::deque<std::shared_ptr<Operation>> executed_;  // here; peers may still be at it
    std::vector<std::shared_ptr<Allocation>> idle_staging_;
    std::uint32_t launched_ = 0;
    int queued_for_thread_ = 0;
    bool executing_ = false;
    bool closing_ = false;

    std::thread thread_;
};

std::shared_ptr<Operation> Group::State::launch(const Request& request, void* data, std::string call) {
    peers_.require_member();
    const std::lock_guard launching(launching_);
    peers_.require_usable();
    check(request, peers_.world_size());
    auto operation = std::make_shared<Operation>(request, launched_, static_cast<char*>(data), std::move(call));
    {
        std::unique_lock lock(mutex_);
        const Waits::HeldUp held_up(peers_.waits(), queue_.size() >= slots_per_rank);
        while (queue_.size() >= slots_per_rank) run_or_wait(lock, *operation);  // the slot is still needed here
    }
    collectives_.await_slot(*operation);
    const std::int64_t offset = place(*operation);
    collectives_.announce(*operation, offset);

    const std::lock_guard lock(mutex_);
    ++launched_;
    queue_.push_back(operation);
    if (wants_thread(*operation)) {
        ++queued_for_thread_;
        work_.notify_one();
    }
    forget_finished();
    return operation;
}

// Finds or makes the buffer that the collective works in; returns its offset in the arena.
std::int64_t Group::State::place(Operation& operation) {
    const std::int64_t bytes = operation.request.bytes();
    if (operation.is_small()) {
        operation.values.resize(static_cast<std::size_t>(bytes));
        if (bytes > 0) std::memcpy(operation.values.data(), operation.user, operation.values.size());
        operation.buffer = operation.values.data();
        return 0;
    }
    operation.buffer = operation.user;
    operation.memory = membership_.arena->find(operation.user, bytes);
    if (operation.memory == nullptr) {
        operation.memory = take_staging(bytes);
        operation.buffer = operation.memory->data();
        std::memcpy(operation.buffer, operation.user, static_cast<std::size_t>(bytes));
    }
    return operation.buffer - membership_.arena->mapping()->data();
}

void Group::State::wait(Operation& operation) {
    peers_.require_member();
    {
        std::unique_lock lock(mutex_);
        const Waits::HeldUp held_up(peers_.waits(), !operation.executed);
        while (!operation.executed) run_or_wait(lock, operation);
    }
    if (!operation.error.empty()) throw CommunicationError(operation.error);
    const std::lock_guard delivering(operation.delivering);
    if (operation.delivered) return;
    if (!operation.is_small()) collectives_.await_finished(operation);
    deliver(operation);
}

void Group::State::deliver(Operation& operation) {
    const bool staged = operation.buffer != operation.user;
    if (staged && operation.request.numel > 0) {
        std::memcpy(operation.user, operation.buffer, static_cast<std::size_t>(operation.request.bytes()));
    }
    const std::lock_guard lock(mutex_);
    if (staged && operation.memory != nullptr) keep_staging(std::move(operation.memory));
    operation.memory = nullptr;
    operation.delivered = true;
    forget_finished();
}

// One step towards an empty queue. Whoever waits works: a small collective needs no other thread. The caller holds the
// lock, as in all that take it.
void Group::State::run_or_wait(std::unique_lock<std::mutex>& lock, const Operation& waited_for) {
    if (!executing_) {
        run_next(lock);
    } else if (done_.wait_for(lock, look_around_every) == std::cv_status::timeout) {
        lock.unlock();
        peers_.require_uninterrupted([&] { return describe(waited_for.request); });
        lock.lock();
    }
}

void Group::State::run_next(std::unique_lock<std::mutex>& lock) {
    const std::shared_ptr<Operation> operation = queue_.front();
    queue_.pop_front();
    if (wants_thread(*operation)) --queued_for_thread_;
    executing_ = true;
    bool interrupted = false;
    lock.unlock();
    try {
        peers_.require_usable();
        collectives_.execute(*operation);
    } catch (const Interrupted& interruption) {
        operation->error = interruption.what();
        interrupted = true;
    } catch (const CommunicationError& error) {
        operation->error = error.what();
        peers_.fail(operation->error);
    } catch (const std::exception& error) {
        operation->error =
            describe(operation->request) + " failed on rank " + std::to_string(peers_.rank()) + ": " + error.what();
        peers_.fail(operation->error);
    }
    lock.lock();
    executing_ = false;
    operation->executed = true;
    if (operation->memory != nullptr) executed_.push_back(operation);
    done_.notify_all();
    if (queued_for_thread_ > 0) work_.notify_one();
    if (interrupted) throw Interrupted("another rank");
}

void Group::State::communicate() {
    peers_.waits().belong_to_this_thread();
    std::unique_lock lock(mutex_);
    while (!closing_) {
        if (!executing_ && queued_for_thread_ > 0) {
            run_next(lock);
        } else {
            work_.wait(lock);
        }
    }
}

// Lets go of the memory of collectives that nobody waited for. The caller holds the lock.
void Group::State::forget_finished() {
    while (!executed_.empty() &&
           (executed_.front()->memory == nullptr || collectives_.is_finished(*executed_.front()))) {
        executed_.pop_front();
    }
}

std::shared_ptr<Allocation> Group::State::take_staging(std::int64_t bytes) {
    {
        const std::lock_guard lock(mutex_);
        for (auto staging = idle_staging_.begin(); staging != idle_staging_.end(); ++staging) {
            if ((*staging)->bytes() < bytes) continue;
            std::shared_ptr<Allocation> taken = std::move(*staging);
            idle_staging_.erase(staging);
            return taken;
        }
    }
    return membership_.arena->allocate(bytes);
}

// For the next one: the first touch of a page costs more than the collective. The caller holds the lock.
void Group::State::keep_staging(std::shared_ptr<Allocation> staging) {
    if (staging->bytes() > most_idle_staging_bytes) return;
    idle_staging_.push_back(std::move(staging));
    if (idle_staging_.size() > idle_staging_buffers) idle_staging_.erase(idle_staging_.begin());
}

void Group::State::close(const std::string& reason) {
    if (peers_.forked()) return;
    const std::lock_guard closing(closing_mutex_);
    if (!thread_.joinable()) return;
    peers_.leave(reason);  // whoever waits for a peer gives up
    {
        const std::lock_guard lock(mutex_);
        closing_ = true;
    }
    work_.notify_one();
    thread_.join();
    const std::lock_guard launching(launching_);
    std::unique_lock lock(mutex_);
    while (executing_) done_.wait(lock);
    for (const auto* operations : {&queue_, &executed_}) {
        for (const auto& operation : *operations) {
            if (operation->memory != nullptr && !collectives_.is_finished(*operation)) operation->memory->leave_pages();
        }
    }
    channels_.leave_pages();
}

Group::Group(Membership membership, std::chrono::milliseconds timeout, int threads, IsInterrupted is_interrupted)
    : state_(std::make_unique<State>(std::move(membership), timeout, threads, std::move(is_interrupted))) {}

Group::~Group() {
    // In a forked child the thread and what it waits on are the parent's: nothing here can be ended.
    if (state_->peers().forked()) static_cast<void>(state_.release());
}

int Group::rank() const { return state_->membership().rank; }
int Group::world_size() const { return state_->membership().world_size(); }

std::shared_ptr<Allocation> Group::allocate(std::int64_t bytes) {
    state_->peers().require_member();
    return state_->membership().arena->allocate(bytes);
}
std::shared_ptr<MappedSlices> Group::map_slices(std::int64_t bytes_per_rank) {
    return MappedSlices::create(*this, state_->peers(), state_->membership(), bytes_per_rank);
}
std::int64_t Group::committed_bytes() const { return state_->membership().arena->committed_bytes(); }

std::shared_ptr<Operation> Group::launch(const Request& request, void* data, std::string call) {
    return state_->launch(request, data, std::move(call));
}
void Group::wait(Operation& operation) { state_->wait(operation); }
void Group::barrier(std::string call) { wait(*launch(Request{}, nullptr, std::move(call))); }

std::shared_ptr<Transfer> Group::send(const void* data, Element element, std::int64_t numel, int to) {
    return state_->channels().send(data, element, numel, to);
}
std::shared_ptr<Transfer> Group::receive(void* data, Element element, std::int64_t numel, int from) {
    return state_->channels().receive(data, element, numel, from);
}
void Group::wait(Transfer& transfer) { state_->channels().wait(transfer); }

std::vector<std::int64_t> Group::waited_ns() const { return state_->peers().waits().nanoseconds(); }

void Group::close(const std::string& reason) { state_->close(reason); }

}  // namespace partita
