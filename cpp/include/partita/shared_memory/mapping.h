// Owners of what the system hands out: file descriptors and mapped memory.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

namespace partita {

class FileDescriptor {
  public:
    FileDescriptor() = default;
    explicit FileDescriptor(int fd) : fd_(fd) {}
    FileDescriptor(FileDescriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    FileDescriptor& operator=(FileDescriptor&& other) noexcept {
        std::swap(fd_, other.fd_);
        return *this;
    }
    ~FileDescriptor();

    int get() const { return fd_; }
    bool valid() const { return fd_ >= 0; }

  private:
    int fd_ = -1;
};

inline constexpr std::int64_t huge_page_bytes = 2 << 20;

// Memory without a name in any file system: it lives as long as somebody has it mapped or open, and no longer. Its size
// is fixed, so no member can make the others' accesses fault. Throws std::system_error.
FileDescriptor anonymous_memory(std::int64_t bytes);
// Whether what another process handed over is such memory, of that size.
bool is_anonymous_memory(int fd, std::int64_t bytes);

// All of an anonymous_memory(), mapped here; pages are committed when first touched.
class Mapping {
  public:
    enum class Access { read, read_write };

    // Throws std::system_error.
    Mapping(int fd, std::int64_t bytes, Access access);
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;
    ~Mapping();

    char* data() const { return data_; }
    std::int64_t bytes() const { return bytes_; }

  private:
    char* data_ = nullptr;
    std::int64_t bytes_ = 0;
};

// std::system_error of errno.
[[noreturn]] void throw_errno(const std::string& what);

}  // namespace partita
