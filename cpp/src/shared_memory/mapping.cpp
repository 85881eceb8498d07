#include "partita/shared_memory/mapping.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

namespace partita {

void throw_errno(const std::string& what) { throw std::system_error(errno, std::generic_category(), what); }

FileDescriptor::~FileDescriptor() {
    if (fd_ >= 0) close(fd_);
}

FileDescriptor anonymous_memory(std::int64_t bytes) {
    FileDescriptor memory(memfd_create("partita", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    if (!memory.valid()) throw_errno("memfd_create");
    if (ftruncate(memory.get(), bytes) != 0) throw_errno("reserving " + std::to_string(bytes) + " bytes");
    if (fcntl(memory.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) throw_errno("F_ADD_SEALS");
    return memory;
}

Mapping::Mapping(int fd, std::int64_t bytes, Access access) : bytes_(bytes) {
    const int protection = access == Access::read ? PROT_READ : PROT_READ | PROT_WRITE;
    void* address = mmap(nullptr, static_cast<std::size_t>(bytes), protection, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (address == MAP_FAILED) throw_errno("mapping " + std::to_string(bytes) + " bytes of shared memory");
    data_ = static_cast<char*>(address);
    const auto size = static_cast<std::size_t>(bytes);
    madvise(address, size, MADV_HUGEPAGE);                              // where the system grants it
    if (access == Access::read) madvise(address, size, MADV_DONTDUMP);  // a peer's core dump has it
}

Mapping::~Mapping() {
    if (data_ != nullptr) munmap(data_, static_cast<std::size_t>(bytes_));
}

}  // namespace partita
