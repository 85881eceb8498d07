#include "partita/shared_memory/request.h"

namespace partita {
namespace {

const char* name_of(Collective collective) {
    switch (collective) {
        case Collective::barrier:
            return "barrier";
        case Collective::all_reduce:
            return "all_reduce";
        case Collective::reduce_scatter:
            return "reduce_scatter";
        case Collective::all_gather:
            return "all_gather";
        default:
            return "broadcast";
    }
}

const char* name_of(Reduction reduction) {
    switch (reduction) {
        case Reduction::sum:
            return "sum";
        case Reduction::average:
            return "average";
        default:
            return "max";
    }
}

bool reduces(Collective collective) {
    return collective == Collective::all_reduce || collective == Collective::reduce_scatter;
}

bool has_slices(Collective collective) {
    return collective == Collective::reduce_scatter || collective == Collective::all_gather;
}

}  // namespace

std::int64_t size_of(Element element) {
    switch (element) {
        case Element::f64:
            return 8;
        case Element::f32:
            return 4;
        case Element::byte:
            return 1;
        default:
            return 2;
    }
}

const char* name_of(Element element) {
    switch (element) {
        case Element::f32:
            return "f32";
        case Element::f16:
            return "f16";
        case Element::bf16:
            return "bf16";
        case Element::f64:
            return "f64";
        default:
            return "bytes";
    }
}

std::int64_t Request::bytes() const { return numel * size_of(element); }

bool Request::operator==(const Request& other) const {
    return collective == other.collective && element == other.element && reduction == other.reduction &&
           root == other.root && numel == other.numel;
}

std::string describe(const Request& request) {
    std::string text = name_of(request.collective);
    if (request.collective == Collective::barrier) return text;
    if (reduces(request.collective)) text += std::string(" (") + name_of(request.reduction) + ")";
    if (request.collective == Collective::broadcast) text += " from rank " + std::to_string(request.root);
    return text + " of " + std::to_string(request.numel) + " " + name_of(request.element);
}

void check(const Request& request, int world_size) {
    if (request.numel < 0) throw std::invalid_argument(describe(request) + ": numel must not be negative");
    if (has_slices(request.collective) && request.numel % world_size != 0) {
        throw std::invalid_argument(describe(request) + ": the buffer must divide evenly among " +
                                    std::to_string(world_size) + " ranks");
    }
    if (request.root < 0 || request.root >= world_size) {
        throw std::invalid_argument(describe(request) + ": the group has the ranks 0 to " +
                                    std::to_string(world_size - 1));
    }
    if (reduces(request.collective) && request.element == Element::byte) {
        throw std::invalid_argument(describe(request) + ": bytes have no sum");
    }
}

}  // namespace partita
