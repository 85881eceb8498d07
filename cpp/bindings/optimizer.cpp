#include <string>

#include "bindings.h"
#include "partita/adam.h"

namespace partita::bindings {

namespace {

template <class Where>
void register_for(py::module_& m) {
    m.def(
        "adam",
        [](const std::vector<AdamPart>& parts, const std::vector<AdamGroup>& groups, std::uintptr_t control,
           Where where) { adam(parts, groups, pointer<StepControl>(control), where); },
        py::arg("parts"), py::arg("groups"), py::arg("control"), py::arg("where"),
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace

void register_optimizer(py::module_& m) {
    py::class_<AdamGroup>(m, "AdamGroup")
        .def(py::init([](double lr, double beta1, double beta2, double eps, double weight_decay, bool decoupled,
                         bool bias_correction, std::int64_t waited) {
                 return AdamGroup{lr, beta1, beta2, eps, weight_decay, decoupled, bias_correction, waited};
             }),
             py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"),
             py::arg("decoupled"), py::arg("bias_correction") = true, py::arg("waited") = 0);
    py::class_<AdamPart>(m, "AdamPart")
        .def(py::init([](Span grads, Span master, std::uintptr_t remainder, Span exp_avg, Span exp_avg_sq, Span params,
                         const Segments& segments) {
                 return AdamPart{{grads, master, exp_avg, exp_avg_sq, params, pointer<std::uint16_t>(remainder)},
                                 &segments};
             }),
             py::arg("grads"), py::arg("master"), py::arg("remainder"), py::arg("exp_avg"), py::arg("exp_avg_sq"),
             py::arg("params"), py::arg("segments"), py::keep_alive<1, 8>());
    m.def(
        "move_grads",
        [](const std::vector<AdamPart*>& parts, const std::vector<std::uintptr_t>& addresses,
           const std::vector<std::int64_t>& numels) {
            if (parts.size() != addresses.size() || parts.size() != numels.size()) {
                throw py::value_error("as many gradients as parts are needed");
            }
            for (std::size_t i = 0; i < parts.size(); ++i) {
                const std::int64_t numel = parts[i]->buffers.grads.numel;
                if (numels[i] != numel) {
                    throw py::value_error("a gradient has " + std::to_string(numels[i]) + " elements, its part " +
                                          std::to_string(numel));
                }
            }
            for (std::size_t i = 0; i < parts.size(); ++i) parts[i]->buffers.grads.data = pointer<void>(addresses[i]);
        },
        py::arg("parts"), py::arg("addresses"), py::arg("numels"));
    register_for<int>(m);
    register_for<Stream>(m);
}

}  // namespace partita::bindings
