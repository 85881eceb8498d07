#include "bindings.h"
#include "partita/adam.h"

namespace partita::bindings {

void register_optimizer(py::module_& m) {
    py::class_<AdamGroup>(m, "AdamGroup")
        .def(py::init([](double lr, double beta1, double beta2, double eps, double weight_decay, bool decoupled) {
                 return AdamGroup{lr, beta1, beta2, eps, weight_decay, decoupled};
             }),
             py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"),
             py::arg("decoupled"));
    m.def(
        "adam",
        [](Span grads, Span master, Span exp_avg, Span exp_avg_sq, Span params, const Segments& segments,
           const std::vector<AdamGroup>& groups, std::uintptr_t control, int threads) {
            adam({grads, master, exp_avg, exp_avg_sq, params}, segments, groups, pointer<StepControl>(control),
                 threads);
        },
        py::arg("grads"), py::arg("master"), py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("params"),
        py::arg("segments"), py::arg("groups"), py::arg("control"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace partita::bindings
