// Ranks as forked processes, for tests: they report through an exit code and a line of text, and die with the test.
#pragma once

#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "group_support.h"

namespace partita {

inline constexpr Token test_token = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
inline constexpr std::int64_t arena_bytes = 256 << 20;

// In a rank: ends it with this text as its report.
inline void require(const ::testing::AssertionResult& result, const std::string& where) {
    if (!result) throw std::runtime_error(where + ": " + result.message());
}
inline void require_true(bool condition, const std::string& text) {
    if (!condition) throw std::runtime_error(text);
}

// A rank's end of the socket to the test's process.
class Pipes {
  public:
    Pipes(int fd, int world_size) : fd_(fd), world_size_(world_size) {}

    void say(const std::string& text) const {
        require_true(send(fd_, text.data(), text.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(text.size()), "send");
    }
    std::string hear() const {
        std::string text(4096, '\0');
        const ssize_t length = recv(fd_, text.data(), text.size(), 0);
        require_true(length >= 0, "recv");
        text.resize(static_cast<std::size_t>(length));
        return text;
    }
    // Gives this rank's address and returns all ranks'; returns when all have given theirs.
    std::vector<std::string> exchange(const std::string& address) const {
        say(address);
        std::vector<std::string> addresses;
        for (int r = 0; r < world_size_; ++r) addresses.push_back(hear());
        return addresses;
    }

  private:
    int fd_;
    int world_size_;
};

// Processes that run a body as rank 0, 1, ...
class Forked {
  public:
    using Body = std::function<void(int rank, const Pipes&)>;

    Forked(int world_size, const Body& body) {
        const pid_t parent = getpid();
        for (int r = 0; r < world_size; ++r) {
            int ends[2];
            if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0) throw_errno("socketpair");
            const pid_t pid = fork();
            if (pid < 0) throw_errno("fork");
            if (pid == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                if (getppid() != parent) _exit(3);
                _exit(run(body, r, Pipes(ends[1], world_size)));
            }
            close(ends[1]);
            ranks_.push_back({pid, FileDescriptor(ends[0])});
        }
    }
    Forked(const Forked&) = delete;
    Forked& operator=(const Forked&) = delete;

    ~Forked() {
        for (Rank& rank : ranks_) {
            if (rank.reaped) continue;
            kill(rank.pid, SIGKILL);
            waitpid(rank.pid, nullptr, 0);
        }
    }

    int world_size() const { return static_cast<int>(ranks_.size()); }
    pid_t pid(int rank) const { return ranks_[static_cast<std::size_t>(rank)].pid; }

    // What a rank says next; empty if it has ended.
    std::string hear(int rank) const {
        std::string text(4096, '\0');
        const ssize_t length = recv(ranks_[static_cast<std::size_t>(rank)].socket.get(), text.data(), text.size(), 0);
        text.resize(static_cast<std::size_t>(std::max<ssize_t>(length, 0)));
        return text;
    }

    // The test's side of Pipes::exchange().
    void relay(const std::function<void(const std::vector<std::string>&)>& between = {}) {
        std::vector<std::string> addresses;
        for (int r = 0; r < world_size(); ++r) addresses.push_back(hear(r));
        if (between) between(addresses);
        for (const Rank& rank : ranks_) {
            for (const std::string& address : addresses) {
                send(rank.socket.get(), address.data(), address.size(), MSG_NOSIGNAL);
            }
        }
    }

    // The wait status of a rank; one that does not end within `longest` is killed.
    int await_exit(int rank, std::chrono::milliseconds longest = 60s) {
        Rank& awaited = ranks_[static_cast<std::size_t>(rank)];
        const auto deadline = std::chrono::steady_clock::now() + longest;
        while (!awaited.reaped) {
            if (std::chrono::steady_clock::now() > deadline) kill(awaited.pid, SIGKILL);
            awaited.reaped = waitpid(awaited.pid, &awaited.status, WNOHANG) == awaited.pid;
            if (!awaited.reaped) std::this_thread::sleep_for(2ms);
        }
        return awaited.status;
    }

    // Why a rank's body failed; empty if it did not.
    std::string report_of(int rank, std::chrono::milliseconds longest = 60s) {
        const int status = await_exit(rank, longest);
        if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return "";
        return "rank " + std::to_string(rank) + " ended with status " + std::to_string(status) + ": " + hear(rank);
    }

    // All ranks' bodies succeed; but the victim's, if there is one, is killed.
    void expect_success(int victim = -1) {
        for (int r = 0; r < world_size(); ++r) {
            if (r != victim) {
                EXPECT_EQ(report_of(r), "");
                continue;
            }
            const int status = await_exit(r);
            EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) << report_of(r);
        }
    }

  private:
    struct Rank {
        pid_t pid;
        FileDescriptor socket;
        bool reaped = false;
        int status = 0;
    };

    static int run(const Body& body, int rank, const Pipes& pipes) {
        try {
            body(rank, pipes);
            return 0;
        } catch (const std::exception& error) {
            pipes.say(error.what());
            return 1;
        }
    }

    std::vector<Rank> ranks_;
};

// Ranks that have met and have a group; the test's process may do something between while it knows their addresses and
// they do not.
class RankProcesses : public Forked {
  public:
    using GroupBody = std::function<void(int rank, Group& group)>;
    using Between = std::function<void(const std::vector<std::string>& addresses)>;

    RankProcesses(int world_size, const GroupBody& body, const Between& between = {},
                  std::chrono::milliseconds timeout = 20s, std::chrono::milliseconds join_timeout = 10s)
        : Forked(world_size, [&](int rank, const Pipes& pipes) {
              std::unique_ptr<Group> group;
              {
                  const Listener listener;
                  const std::vector<std::string> addresses = pipes.exchange(listener.address());
                  Membership membership = join(listener, rank, addresses, test_token, arena_bytes, join_timeout);
                  group = std::make_unique<Group>(std::move(membership), timeout, 1);
              }
              body(rank, *group);
          }) {
        relay(between);
    }
};

}  // namespace partita
