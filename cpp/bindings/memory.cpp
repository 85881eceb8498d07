#include <string>

#include "bindings.h"
#include "partita/segments.h"
#include "partita/span.h"
#include "partita/stream.h"

namespace partita::bindings {

void register_memory(py::module_& m) {
    py::enum_<DType>(m, "DType").value("f32", DType::f32).value("f16", DType::f16).value("bf16", DType::bf16);

    py::class_<Span>(m, "Span")
        .def(py::init([](std::uintptr_t address, std::int64_t numel, DType dtype) {
                 if (numel < 0) throw py::value_error("numel must not be negative: " + std::to_string(numel));
                 return Span{pointer<void>(address), numel, dtype};
             }),
             py::arg("address"), py::arg("numel"), py::arg("dtype"))
        .def_property_readonly("address", [](const Span& s) { return reinterpret_cast<std::uintptr_t>(s.data); })
        .def_readonly("numel", &Span::numel)
        .def_readonly("dtype", &Span::dtype);

    py::class_<Stream>(m, "Stream")
        .def(py::init([](int device, std::uintptr_t handle) { return Stream{device, pointer<void>(handle)}; }),
             py::arg("device"), py::arg("handle"));

    py::class_<Segments>(m, "Segments")
        .def(py::init([](const std::vector<std::tuple<std::int64_t, std::int64_t, std::int32_t>>& rows) {
                 std::vector<Segment> segments;
                 for (const auto& [offset, numel, group] : rows) segments.push_back({offset, numel, group});
                 return Segments(segments);
             }),
             py::arg("segments"))
        .def_property_readonly("numel", &Segments::numel)
        .def_property_readonly("end", &Segments::end);
}

}  // namespace partita::bindings
