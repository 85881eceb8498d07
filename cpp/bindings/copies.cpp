#include "bindings.h"
#include "partita/copy.h"
#include "partita/norm.h"

namespace partita::bindings {

void register_copies(py::module_& m) {
    using release = py::call_guard<py::gil_scoped_release>;
    m.def("pack", &pack, py::arg("destination"), py::arg("sources"), py::arg("offsets"), py::arg("scale"),
          py::arg("accumulate"), py::arg("threads"), release());
    m.def("unpack", &unpack, py::arg("source"), py::arg("destinations"), py::arg("offsets"), py::arg("scale"),
          py::arg("accumulate"), py::arg("threads"), release());
    m.def("cast", &cast, py::arg("destination"), py::arg("source"), py::arg("scale"), py::arg("accumulate"),
          py::arg("threads"), release());
    m.def(
        "norm",
        [](std::uintptr_t sum_of_squares, Span values, const Segments& segments, int threads) {
            norm(pointer<double>(sum_of_squares), values, segments, threads);
        },
        py::arg("sum_of_squares"), py::arg("values"), py::arg("segments"), py::arg("threads"), release());
}

}  // namespace partita::bindings
