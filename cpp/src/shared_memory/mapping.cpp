#include "partita/shared_memory/mapping.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
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

std::int64_t page_bytes() {
    static const std::int64_t bytes = sysconf(_SC_PAGESIZE);
    return bytes;
}

static_assert(sizeof(void*) == 8, "arenas are larger than the addresses of 32 bits");

AddressRange::AddressRange(std::int64_t bytes) : bytes_(bytes) {
    constexpr std::size_t alignment = huge_page_bytes;
    const std::size_t longer = static_cast<std::size_t>(bytes) + alignment;
    void* found = mmap(nullptr, longer, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) throw_errno("reserving " + std::to_string(longer) + " bytes of addresses");
    char* begin = static_cast<char*>(found);
    const std::size_t before = -reinterpret_cast<std::uintptr_t>(begin) % alignment;
    if (before > 0) munmap(begin, before);
    const std::int64_t pages = (bytes + page_bytes() - 1) / page_bytes();
    const std::size_t used = before + static_cast<std::size_t>(pages * page_bytes());
    if (used < longer) munmap(begin + used, longer - used);
    data_ = begin + before;
}

AddressRange::~AddressRange() {
    if (data_ != nullptr) munmap(data_, static_cast<std::size_t>(bytes_));
}

Mapping::Mapping(int fd, std::int64_t bytes, Access access) : addresses_(bytes) {
    const int protection = access == Access::read ? PROT_READ : PROT_READ | PROT_WRITE;
    const auto size = static_cast<std::size_t>(bytes);
    if (mmap(data(), size, protection, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, fd, 0) == MAP_FAILED) {
        throw_errno("mapping " + std::to_string(bytes) + " bytes of shared memory");
    }
    madvise(data(), size, MADV_HUGEPAGE);  // where the system grants it
    madvise(data(), size, MADV_DONTDUMP);  // a core dump would touch, and so commit, all of it
}

void Mapping::map_again(std::int64_t offset, std::int64_t bytes, char* address) const {
    const auto size = static_cast<std::size_t>(bytes);
    // Of shared memory, an old size of 0 makes a second mapping; advice and the rest are the first one's.
    const void* again = mremap(data() + offset, 0, size, MREMAP_MAYMOVE | MREMAP_FIXED, address);
    if (again == MAP_FAILED || mprotect(address, size, PROT_READ | PROT_WRITE) != 0) {
        throw_errno("mapping " + std::to_string(bytes) + " bytes of shared memory once more");
    }
}

bool is_anonymous_memory(int fd, std::int64_t bytes) {
    struct stat status{};
    const int seals = fcntl(fd, F_GET_SEALS);
    return seals >= 0 && (seals & F_SEAL_SHRINK) != 0 && fstat(fd, &status) == 0 && status.st_size == bytes;
}

}  // namespace partita
