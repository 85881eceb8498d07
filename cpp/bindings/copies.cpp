#include "bindings.h"
#include "partita/copy.h"
#include "partita/norm.h"
#include "partita/weights.h"

namespace partita::bindings {

namespace {

using release = py::call_guard<py::gil_scoped_release>;

// The forms for the CPU (Where is a number of threads) and for CUDA (a Stream).
template <class Where>
void register_for(py::module_& m) {
    m.def(
        "pack",
        [](Span destination, const std::vector<Span>& sources, const std::vector<std::int64_t>& offsets, float scale,
           std::uintptr_t factor, bool accumulate,
           Where where) { pack(destination, sources, offsets, {scale, pointer<double>(factor)}, accumulate, where); },
        py::arg("destination"), py::arg("sources"), py::arg("offsets"), py::arg("scale"), py::arg("factor"),
        py::arg("accumulate"), py::arg("where"), release());
    m.def(
        "cast",
        [](Span destination, Span source, float scale, bool accumulate, Where where) {
            cast(destination, source, scale, accumulate, where);
        },
        py::arg("destination"), py::arg("source"), py::arg("scale"), py::arg("accumulate"), py::arg("where"),
        release());
    m.def(
        "split_master",
        [](Span params, std::uintptr_t remainder, Span master, Where where) {
            split_master(params, pointer<std::uint16_t>(remainder), master, where);
        },
        py::arg("params"), py::arg("remainder"), py::arg("master"), py::arg("where"), release());
    m.def(
        "join_master",
        [](Span master, Span params, std::uintptr_t remainder, Where where) {
            join_master(master, params, pointer<std::uint16_t>(remainder), where);
        },
        py::arg("master"), py::arg("params"), py::arg("remainder"), py::arg("where"), release());
}

}  // namespace

void register_copies(py::module_& m) {
    register_for<int>(m);
    register_for<Stream>(m);
    py::class_<NormPart>(m, "NormPart")
        .def(py::init([](Span values, const Segments& segments) { return NormPart{values, &segments}; }),
             py::arg("values"), py::arg("segments"), py::keep_alive<1, 3>())
        .def_property_readonly("blocks", [](const NormPart& part) { return part.segments->blocks().size(); });
    m.def(
        "norm",
        [](std::uintptr_t sum_of_squares, const std::vector<NormPart>& parts, int threads) {
            norm(pointer<double>(sum_of_squares), parts, threads);
        },
        py::arg("sum_of_squares"), py::arg("parts"), py::arg("threads"), release());
    m.def(
        "norm",
        [](std::uintptr_t sum_of_squares, const std::vector<NormPart>& parts, std::uintptr_t scratch, Stream stream) {
            norm(pointer<double>(sum_of_squares), parts, pointer<double>(scratch), stream);
        },
        py::arg("sum_of_squares"), py::arg("parts"), py::arg("scratch"), py::arg("stream"), release());
}

}  // namespace partita::bindings
