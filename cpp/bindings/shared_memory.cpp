#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "bindings.h"
#include "partita/reduce.h"
#include "partita/shared_memory/group.h"

namespace partita::bindings {

namespace {

using release = py::call_guard<py::gil_scoped_release>;

std::chrono::milliseconds milliseconds(double seconds) {
    if (!(seconds > 0 && seconds <= 1e6)) throw py::value_error("a timeout is above 0 and at most 1e6 seconds");
    return std::chrono::milliseconds(static_cast<std::int64_t>(std::ceil(seconds * 1000)));
}

using GroupPointer = std::shared_ptr<Group>;

// Ranks meet right after they have told each other their addresses; who is not there by then will not come.
constexpr auto longest_meeting = std::chrono::milliseconds(60'000);

// What Python holds of a collective, or of a send or receive.
template <class Work>
struct Pending {
    GroupPointer group;
    std::shared_ptr<Work> work;
    void wait() const { group->wait(*work); }
};

Token token_of(const std::string& bytes) {
    Token token{};
    if (bytes.size() != token.size()) throw py::value_error("a token has " + std::to_string(token.size()) + " bytes");
    std::copy(bytes.begin(), bytes.end(), token.begin());
    return token;
}

void register_requests(py::module_& m) {
    py::register_exception<CommunicationError>(m, "CommunicationError", PyExc_RuntimeError);
    py::enum_<Element>(m, "Element")
        .value("f32", Element::f32)
        .value("f16", Element::f16)
        .value("bf16", Element::bf16)
        .value("f64", Element::f64)
        .value("byte", Element::byte);
    py::enum_<Collective>(m, "Collective")
        .value("barrier", Collective::barrier)
        .value("all_reduce", Collective::all_reduce)
        .value("reduce_scatter", Collective::reduce_scatter)
        .value("all_gather", Collective::all_gather)
        .value("broadcast", Collective::broadcast);
    py::enum_<Reduction>(m, "Reduction")
        .value("sum", Reduction::sum)
        .value("average", Reduction::average)
        .value("max", Reduction::max);
    m.def(
        "reduce",
        [](Span to, const std::vector<Span>& sources, Reduction reduction, int threads) {
            std::vector<const void*> addresses;
            for (const Span& source : sources) {
                if (source.numel != to.numel || source.dtype != to.dtype) {
                    throw std::invalid_argument("all spans of a reduction have the same size and type");
                }
                addresses.push_back(source.data);
            }
            reduce(to, addresses.data(), static_cast<int>(addresses.size()), reduction, threads);
        },
        py::arg("to"), py::arg("sources"), py::arg("reduction"), py::arg("threads"), release());
}

void register_group(py::module_& m) {
    py::class_<Listener>(m, "Listener")
        .def(py::init<>())
        .def_property_readonly("address", [](const Listener& l) { return py::bytes(l.address()); })
        .def("close", &Listener::close);
    py::class_<Allocation, std::shared_ptr<Allocation>>(m, "SharedBuffer", py::buffer_protocol())
        .def_buffer([](Allocation& a) { return py::buffer_info(a.data(), a.bytes()); });
    py::class_<MappedSlices, std::shared_ptr<MappedSlices>>(m, "MappedSlices", py::buffer_protocol())
        .def_buffer([](MappedSlices& s) { return py::buffer_info(s.data(), s.bytes()); });
    py::class_<Pending<Operation>>(m, "Operation").def("wait", &Pending<Operation>::wait, release());
    py::class_<Pending<Transfer>>(m, "Transfer").def("wait", &Pending<Transfer>::wait, release());

    py::class_<Group, GroupPointer>(m, "SharedMemoryGroup")
        .def(py::init([](const Listener& listener, int rank, const std::vector<std::string>& addresses,
                         const std::string& token, double timeout_seconds, int threads) {
                 const Token parsed = token_of(token);
                 const py::gil_scoped_release released;
                 const std::int64_t bytes = Arena::default_capacity_bytes(static_cast<int>(addresses.size()));
                 const auto timeout = milliseconds(timeout_seconds);
                 return std::make_shared<Group>(
                     join(listener, rank, addresses, parsed, bytes, std::min(timeout, longest_meeting)), timeout,
                     threads, is_interrupted);
             }),
             py::arg("listener"), py::arg("rank"), py::arg("addresses"), py::arg("token"), py::arg("timeout_seconds"),
             py::arg("threads"))
        .def_property_readonly("rank", &Group::rank)
        .def_property_readonly("world_size", &Group::world_size)
        .def_property_readonly("committed_bytes", &Group::committed_bytes)
        .def("allocate", &Group::allocate, py::arg("nbytes"))
        .def("map_slices", &Group::map_slices, py::arg("nbytes_per_rank"), release())
        .def(
            "launch",
            [](const GroupPointer& g, Collective collective, std::uintptr_t address, std::int64_t numel,
               Element element, Reduction reduction, int root, std::string call) {
                const Request request{collective, element, reduction, root, numel};
                return Pending<Operation>{g, g->launch(request, pointer<void>(address), std::move(call))};
            },
            py::arg("collective"), py::arg("address"), py::arg("numel"), py::arg("element"),
            py::arg("reduction") = Reduction::sum, py::arg("root") = 0, py::arg("call") = "", release())
        .def(
            "send",
            [](const GroupPointer& g, std::uintptr_t address, std::int64_t numel, Element element, int to) {
                return Pending<Transfer>{g, g->send(pointer<void>(address), element, numel, to)};
            },
            py::arg("address"), py::arg("numel"), py::arg("element"), py::arg("to"), release())
        .def(
            "receive",
            [](const GroupPointer& g, std::uintptr_t address, std::int64_t numel, Element element, int from) {
                return Pending<Transfer>{g, g->receive(pointer<void>(address), element, numel, from)};
            },
            py::arg("address"), py::arg("numel"), py::arg("element"), py::arg("source"), release())
        .def("waited_ns", &Group::waited_ns)
        .def("barrier", &Group::barrier, py::arg("call") = "", release())
        .def("close", &Group::close, py::arg("reason") = "", release());
}

}  // namespace

void register_shared_memory(py::module_& m) {
    register_requests(m);
    register_group(m);
}

}  // namespace partita::bindings
