#include "shared_memory/channels.h"

#include <cstring>

namespace partita {

Channels::Channels(Peers& peers, std::shared_ptr<Arena> arena, const std::vector<Member>& members)
    : peers_(peers), arena_(std::move(arena)), members_(members) {
    for (std::size_t r = 0; r < members.size(); ++r) {
        outgoing_.push_back(std::make_unique<Outgoing>());
        incoming_.push_back(std::make_unique<Incoming>());
    }
}

void Channels::check(int peer, std::int64_t numel, const char* what) const {
    if (peer < 0 || peer >= peers_.world_size() || peer == peers_.rank()) {
        throw std::invalid_argument(std::string(what) + " rank " + std::to_string(peer) + ": rank " +
                                    std::to_string(peers_.rank()) + " has no such peer in a group of " +
                                    std::to_string(peers_.world_size()));
    }
    if (numel < 0) throw std::invalid_argument(std::string(what) + ": numel must not be negative");
}

std::string Channels::describe(const Transfer& transfer) const {
    return std::string(transfer.sends ? "send to" : "receive from") + " rank " + std::to_string(transfer.peer) +
           " of " + std::to_string(transfer.numel) + " " + name_of(transfer.element) + ", number " +
           std::to_string(transfer.number) + ",";
}

std::shared_ptr<Transfer> Channels::send(const void* data, Element element, std::int64_t numel, int to) {
    peers_.require_member();
    peers_.require_usable();
    check(to, numel, "send to");
    Outgoing& outgoing = *outgoing_[static_cast<std::size_t>(to)];
    const std::lock_guard lock(outgoing.mutex);
    auto transfer = std::make_shared<Transfer>(true, to, outgoing.sent, element, numel, nullptr);
    Channel& channel = peers_.control().channel(peers_.rank(), to);
    peers_.await(to, channel.taken, transfer->number + 1 - messages_per_channel, [&] { return describe(*transfer); });

    const std::int64_t bytes = numel * size_of(element);
    transfer->memory = arena_->find(data, bytes);
    transfer->in_place = transfer->memory != nullptr;
    const char* from = static_cast<const char*>(data);
    if (!transfer->in_place) {
        transfer->memory = arena_->allocate(bytes);
        if (bytes > 0) std::memcpy(transfer->memory->data(), data, static_cast<std::size_t>(bytes));
        from = transfer->memory->data();
    }
    channel.messages[transfer->number % messages_per_channel] = {element, numel, from - arena_->mapping()->data()};
    ++outgoing.sent;
    outgoing.untaken.push_back(transfer);
    channel.sent.raise(outgoing.sent);
    forget_taken(to, outgoing);
    return transfer;
}

std::shared_ptr<Transfer> Channels::receive(void* data, Element element, std::int64_t numel, int from) {
    peers_.require_member();
    peers_.require_usable();
    check(from, numel, "receive from");
    Incoming& incoming = *incoming_[static_cast<std::size_t>(from)];
    const std::lock_guard lock(incoming.mutex);
    auto transfer = std::make_shared<Transfer>(false, from, incoming.asked++, element, numel, data);
    incoming.unreceived.push_back(transfer);
    return transfer;
}

void Channels::wait(Transfer& transfer) {
    peers_.require_member();
    const auto peer = static_cast<std::size_t>(transfer.peer);
    if (!transfer.sends) {
        const std::lock_guard receiving(incoming_[peer]->receiving);
        while (!transfer.done) receive_next(transfer.peer, *incoming_[peer]);
        return;
    }
    if (transfer.in_place) {
        Signal& taken = peers_.control().channel(peers_.rank(), transfer.peer).taken;
        peers_.await(transfer.peer, taken, transfer.number + 1, [&] { return describe(transfer); });
    }
    const std::lock_guard lock(outgoing_[peer]->mutex);
    forget_taken(transfer.peer, *outgoing_[peer]);
}

void Channels::receive_next(int from, Incoming& incoming) {
    std::shared_ptr<Transfer> transfer;
    {
        const std::lock_guard lock(incoming.mutex);
        transfer = incoming.unreceived.front().lock();
    }
    Channel& channel = peers_.control().channel(from, peers_.rank());
    const std::uint32_t number = incoming.received;
    peers_.await(from, channel.sent, number + 1, [&] {
        return transfer ? describe(*transfer) : "an abandoned receive from rank " + std::to_string(from);
    });
    const Channel::Message& message = channel.messages[number % messages_per_channel];
    if (transfer != nullptr) {
        if (message.element != transfer->element || message.numel != transfer->numel) {
            peers_.fail(describe(*transfer) + " on rank " + std::to_string(peers_.rank()) + ": rank " +
                        std::to_string(from) + " sent " + std::to_string(message.numel) + " " +
                        name_of(message.element));
            peers_.require_usable();
        }
        const char* source = members_[static_cast<std::size_t>(from)].memory->data() + message.offset;
        const std::int64_t bytes = message.numel * size_of(message.element);
        if (bytes > 0) std::memcpy(transfer->data, source, static_cast<std::size_t>(bytes));
        transfer->done = true;
    }
    {
        const std::lock_guard lock(incoming.mutex);
        incoming.unreceived.pop_front();
    }
    channel.taken.raise(++incoming.received);
}

void Channels::forget_taken(int to, Outgoing& outgoing) {
    const Signal& taken = peers_.control().channel(peers_.rank(), to).taken;
    while (!outgoing.untaken.empty() && taken.reached(outgoing.untaken.front()->number + 1)) {
        outgoing.untaken.front()->memory = nullptr;
        outgoing.untaken.pop_front();
    }
}

void Channels::leave_pages() {
    for (const auto& outgoing : outgoing_) {
        const std::lock_guard lock(outgoing->mutex);
        for (const auto& transfer : outgoing->untaken) {
            if (transfer->memory != nullptr) transfer->memory->leave_pages();
        }
    }
}

}  // namespace partita
