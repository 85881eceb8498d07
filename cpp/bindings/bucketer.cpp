#include "partita/bucketer.h"

#include "bindings.h"

namespace partita::bindings {

namespace {

std::pair<std::int32_t, std::int32_t> as_pair(Bucketer::Range range) { return {range.begin, range.end}; }

}  // namespace

void register_bucketer(py::module_& m) {
    py::class_<Bucketer>(m, "Bucketer")
        .def(py::init<std::vector<std::int32_t>, std::int32_t>(), py::arg("unit_of"), py::arg("units"))
        .def("begin_backward", &Bucketer::begin_backward, py::arg("overlap"))
        .def(
            "mark_ready", [](Bucketer& b, std::int32_t p) { return as_pair(b.mark_ready(p)); }, py::arg("parameter"))
        .def("is_complete", &Bucketer::is_complete, py::arg("parameter"))
        .def("was_launched", &Bucketer::was_launched, py::arg("parameter"))
        .def("finish", [](Bucketer& b) { return as_pair(b.finish()); })
        .def_property_readonly("in_backward", &Bucketer::in_backward);
}

}  // namespace partita::bindings
