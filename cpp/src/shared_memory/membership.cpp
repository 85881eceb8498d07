#include "partita/shared_memory/membership.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstddef>
#include <cstring>

#include "partita/shared_memory/request.h"
#include "shared_memory/control.h"

namespace partita {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t most_fds = 2;
constexpr auto patience_with_strangers = std::chrono::seconds(5);  // members speak as soon as they are connected

// What two ranks tell each other, together with the descriptors of their memory (and of the control memory, by rank 0).
struct Hello {
    Token token;
    std::int32_t rank;
    std::int32_t world_size;
    std::int64_t arena_bytes;
    std::int64_t control_bytes;  // differs between versions that lay it out differently
};

struct Introduction {
    Hello hello;
    FileDescriptor fds[most_fds];
};

FileDescriptor make_socket() {
    FileDescriptor made(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    if (!made.valid()) throw_errno("socket");
    return made;
}

ucred credentials_of(int socket) {
    ucred peer{};
    socklen_t size = sizeof peer;
    if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) throw_errno("SO_PEERCRED");
    return peer;
}

// False when nothing comes before the deadline.
bool readable_before(int socket, Clock::time_point deadline) {
    for (;;) {
        const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
        pollfd state{socket, POLLIN, 0};
        const int ready = poll(&state, 1, static_cast<int>(std::clamp<std::int64_t>(left, 0, INT_MAX)));
        if (ready >= 0) return ready > 0;
        if (errno != EINTR) throw_errno("poll");
    }
}

// False when the other side has gone.
bool send_hello(int socket, const Hello& hello, const std::vector<int>& fds) {
    Hello content = hello;
    iovec part{&content, sizeof content};
    alignas(cmsghdr) char ancillary[CMSG_SPACE(most_fds * sizeof(int))] = {};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = ancillary;
    message.msg_controllen = CMSG_SPACE(fds.size() * sizeof(int));
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
    std::memcpy(CMSG_DATA(header), fds.data(), fds.size() * sizeof(int));
    return sendmsg(socket, &message, MSG_NOSIGNAL) >= 0;
}

// False when the other side said nothing sensible.
bool receive_hello(int socket, Introduction& introduction) {
    iovec part{&introduction.hello, sizeof(Hello)};
    alignas(cmsghdr) char ancillary[CMSG_SPACE(most_fds * sizeof(int))] = {};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = ancillary;
    message.msg_controllen = sizeof ancillary;
    const ssize_t received = recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
    if (received >= 0 && (message.msg_flags & MSG_CTRUNC) != 0) {
        throw std::system_error(EMFILE, std::generic_category(), "taking over another rank's memory");
    }
    const cmsghdr* header = received < 0 ? nullptr : CMSG_FIRSTHDR(&message);
    if (header != nullptr && header->cmsg_type == SCM_RIGHTS) {
        const std::size_t count = std::min((header->cmsg_len - CMSG_LEN(0)) / sizeof(int), most_fds);
        int fds[most_fds];
        std::memcpy(fds, CMSG_DATA(header), count * sizeof(int));
        for (std::size_t i = 0; i < count; ++i) introduction.fds[i] = FileDescriptor(fds[i]);
    }
    return received == static_cast<ssize_t>(sizeof(Hello)) && introduction.fds[0].valid();
}

FileDescriptor connect_to(const std::string& address, Clock::time_point deadline) {
    FileDescriptor connection = make_socket();
    const auto left = std::chrono::duration_cast<std::chrono::seconds>(deadline - Clock::now()).count();
    const timeval patience{std::max<std::int64_t>(left, 1), 0};
    if (setsockopt(connection.get(), SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience) != 0) throw_errno("timeout");
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    if (address.size() > sizeof name.sun_path) throw std::invalid_argument("an address of a rank is too long");
    std::memcpy(name.sun_path, address.data(), address.size());
    const auto length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + address.size());
    if (connect(connection.get(), reinterpret_cast<const sockaddr*>(&name), length) != 0) throw_errno("connect");
    return connection;
}

// The meeting of one rank with all others: it connects to the lower ranks and is connected to by the higher ones.
class Meeting {
  public:
    Meeting(int rank, const std::vector<std::string>& addresses, const Token& token, std::int64_t arena_bytes,
            Clock::time_point deadline)
        : addresses_(addresses), token_(token), deadline_(deadline) {
        const int world_size = static_cast<int>(addresses.size());
        result_.rank = rank;
        result_.arena = Arena::create(arena_bytes);
        result_.members.resize(addresses.size());
        result_.members[static_cast<std::size_t>(rank)] = {getpid(), result_.arena->mapping()};
        if (rank == 0) {
            control_ = anonymous_memory(Control::bytes(world_size));
            result_.control = map_control(control_.get());
        }
    }

    Membership run(const Listener& listener) {
        std::vector<FileDescriptor> lower;
        for (int r = 0; r < result_.rank; ++r) lower.push_back(call(r));
        for (int r = result_.rank + 1; r < result_.world_size(); ++r) answer_one(listener);
        for (int r = 0; r < result_.rank; ++r) {
            const int socket = lower[static_cast<std::size_t>(r)].get();
            Introduction introduction;
            const bool came = readable_before(socket, deadline_);
            if (!came || !receive_hello(socket, introduction) || !admit(socket, introduction)) missing(r);
        }
        return std::move(result_);
    }

  private:
    std::shared_ptr<Mapping> map_control(int fd) const {
        return std::make_shared<Mapping>(fd, Control::bytes(result_.world_size()), Mapping::Access::read_write);
    }

    [[noreturn]] void missing(int rank, const std::string& why = "") const {
        throw CommunicationError("rank " + std::to_string(rank) + " did not join the shared-memory group of rank " +
                                 std::to_string(result_.rank) + (why.empty() ? "" : ": " + why));
    }

    void introduce_to(int socket, int rank) {
        const Hello hello{token_, result_.rank, result_.world_size(), result_.arena->capacity_bytes(),
                          Control::bytes(result_.world_size())};
        std::vector<int> fds{result_.arena->fd()};
        if (result_.rank == 0) fds.push_back(control_.get());
        if (!send_hello(socket, hello, fds)) missing(rank);
    }

    FileDescriptor call(int rank) {
        FileDescriptor connection;
        try {
            connection = connect_to(addresses_[static_cast<std::size_t>(rank)], deadline_);
        } catch (const std::system_error& error) {
            missing(rank, error.what());
        }
        if (credentials_of(connection.get()).uid != geteuid()) {
            throw CommunicationError("rank " + std::to_string(rank) + " runs as another user");
        }
        introduce_to(connection.get(), rank);
        return connection;
    }

    // Lets in one of the higher ranks; whoever does not belong here is turned away.
    void answer_one(const Listener& listener) {
        for (;;) {
            if (!readable_before(listener.fd(), deadline_) || Clock::now() >= deadline_) missing(first_missing());
            const FileDescriptor connection(accept4(listener.fd(), nullptr, nullptr, SOCK_CLOEXEC));
            if (!connection.valid() && errno != EINTR && errno != EAGAIN && errno != ECONNABORTED)
                throw_errno("accept");
            Introduction introduction;
            if (!connection.valid() || credentials_of(connection.get()).uid != geteuid()) continue;
            if (!readable_before(connection.get(), std::min(deadline_, Clock::now() + patience_with_strangers)))
                continue;
            if (!receive_hello(connection.get(), introduction) || !admit(connection.get(), introduction)) continue;
            introduce_to(connection.get(), introduction.hello.rank);
            return;
        }
    }

    // Of those that connect to this one.
    int first_missing() const {
        int rank = result_.rank + 1;
        while (result_.members[static_cast<std::size_t>(rank)].memory != nullptr) ++rank;
        return rank;
    }

    bool admit(int socket, Introduction& introduction) {
        const Hello& hello = introduction.hello;
        const std::int64_t control_bytes = Control::bytes(result_.world_size());
        const bool belongs = hello.token == token_ && hello.world_size == result_.world_size() && hello.rank >= 0 &&
                             hello.rank < hello.world_size && hello.control_bytes == control_bytes &&
                             is_anonymous_memory(introduction.fds[0].get(), hello.arena_bytes) &&
                             (hello.rank > 0 || is_anonymous_memory(introduction.fds[1].get(), control_bytes));
        if (!belongs) return false;
        Member& member = result_.members[static_cast<std::size_t>(hello.rank)];
        if (member.memory != nullptr) return false;
        const int arena = introduction.fds[0].get();
        member = {credentials_of(socket).pid,
                  std::make_shared<Mapping>(arena, hello.arena_bytes, Mapping::Access::read)};
        if (hello.rank == 0) result_.control = map_control(introduction.fds[1].get());
        return true;
    }

    const std::vector<std::string>& addresses_;
    Token token_;
    Clock::time_point deadline_;
    FileDescriptor control_;
    Membership result_;
};

}  // namespace

Listener::Listener() : socket_(make_socket()) {
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    socklen_t length = sizeof name.sun_family;  // no name: the system chooses a free abstract one
    if (bind(socket_.get(), reinterpret_cast<const sockaddr*>(&name), length) != 0) throw_errno("bind");
    length = sizeof name;
    if (getsockname(socket_.get(), reinterpret_cast<sockaddr*>(&name), &length) != 0) throw_errno("getsockname");
    if (listen(socket_.get(), SOMAXCONN) != 0) throw_errno("listen");
    address_.assign(name.sun_path, length - offsetof(sockaddr_un, sun_path));
}

Membership join(const Listener& listener, int rank, const std::vector<std::string>& addresses, const Token& token,
                std::int64_t arena_bytes, std::chrono::milliseconds timeout) {
    if (rank < 0 || rank >= static_cast<int>(addresses.size())) {
        throw std::invalid_argument("rank " + std::to_string(rank) + " in a group of " +
                                    std::to_string(addresses.size()));
    }
    return Meeting(rank, addresses, token, arena_bytes, Clock::now() + timeout).run(listener);
}

}  // namespace partita
