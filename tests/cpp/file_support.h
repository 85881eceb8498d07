// Files and memory for tests of the file queue.
#pragma once

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "support.h"

namespace partita {

using namespace std::chrono_literals;
using Bytes = std::vector<unsigned char>;

inline Bytes random_bytes(std::int64_t size, std::uint32_t seed = 1) {
    Random random(seed);
    Bytes bytes(static_cast<std::size_t>(size));
    for (unsigned char& byte : bytes) byte = static_cast<unsigned char>(random.bits() >> 3);
    return bytes;
}

inline std::int64_t size_of(const Bytes& bytes) { return static_cast<std::int64_t>(bytes.size()); }

// A file without a name.
class File {
  public:
    explicit File(const std::string& folder = ::testing::TempDir())
        : fd_(open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600)) {
        if (fd_ < 0) throw std::runtime_error("no file in " + folder + ": " + std::strerror(errno));
    }
    File(const File&) = delete;
    File& operator=(const File&) = delete;
    ~File() { close(fd_); }

    int fd() const { return fd_; }
    std::int64_t size() const {
        struct stat status{};
        fstat(fd_, &status);
        return status.st_size;
    }
    Bytes content() const {
        Bytes bytes(static_cast<std::size_t>(size()));
        lseek(fd_, 0, SEEK_SET);
        if (::read(fd_, bytes.data(), bytes.size()) != size_of(bytes)) bytes.clear();
        return bytes;
    }

  private:
    int fd_;
};

// A page of memory at which a thread that reads it stops, until open().
class Gate {
  public:
    Gate() : page_(mmap(nullptr, nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
        struct sigaction action{};
        action.sa_handler = &stop;
        sigaction(SIGSEGV, &action, &before_);
        closed_page = page_;
        arrived = 0;
    }
    Gate(const Gate&) = delete;
    Gate& operator=(const Gate&) = delete;
    ~Gate() {
        open();
        while (inside > 0) std::this_thread::sleep_for(1ms);
        sigaction(SIGSEGV, &before_, nullptr);
        munmap(page_, nbytes);
    }

    const void* page() const { return page_; }
    void open() { closed_page = nullptr; }
    void await_arrival(int threads = 1) const {
        while (arrived < threads) std::this_thread::sleep_for(1ms);
    }

    static constexpr std::int64_t nbytes = 4096;

  private:
    static void stop(int) {
        ++inside;
        ++arrived;
        void* page = closed_page;
        while (closed_page != nullptr) {
            const timespec moment{0, 1'000'000};
            nanosleep(&moment, nullptr);
        }
        if (page != nullptr) mprotect(page, nbytes, PROT_READ);
        --inside;
    }

    static inline std::atomic<void*> closed_page = nullptr;
    static inline std::atomic<int> arrived = 0, inside = 0;

    void* page_;
    struct sigaction before_{};
};

}  // namespace partita
