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
std::int64_t page_bytes();

// Memory without a name in any file system: it lives as long as somebody has it mapped or open, and no longer. Its size
// is fixed, so no member can make the others' accesses fault. Throws std::system_error.
FileDescriptor anonymous_memory(std::int64_t bytes);
// Whether what another process handed over is such memory, of that size.
bool is_anonymous_memory(int fd, std::int64_t bytes);

// Addresses to map memory into; they go, and with them what is mapped there, when this dies.
class AddressRange {
  public:
    // Begins where a huge page may: memory from the beginning of a file can then lie in huge pages. Throws
    // std::system_error.
    explicit AddressRange(std::int64_t bytes);
    AddressRange(AddressRange&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
    AddressRange& operator=(AddressRange&&) = delete;
    ~AddressRange();

    char* data() const { return data_; }
    std::int64_t bytes() const { return bytes_; }

  private:
    char* data_ = nullptr;
    std::int64_t bytes_ = 0;
};

// All of an anonymous_memory(), mapped here; pages are committed when first touched.
class Mapping {
  public:
    enum class Access { read, read_write };

    // Throws std::system_error.
    Mapping(int fd, std::int64_t bytes, Access access);
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    char* data() const { return addresses_.data(); }
    std::int64_t bytes() const { return addresses_.bytes(); }
    // Maps whole pages of this memory once more, to be read and written, at `address` in a range of the caller's. They
    // stay there when this mapping dies. Throws std::system_error.
    void map_again(std::int64_t offset, std::int64_t bytes, char* address) const;

  private:
    AddressRange addresses_;
};

// std::system_error of errno.
[[noreturn]] void throw_errno(const std::string& what);

}  // namespace partita
