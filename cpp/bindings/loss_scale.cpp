#include "partita/loss_scale.h"

#include <optional>

#include "bindings.h"

namespace partita::bindings {

namespace {

// A struct that lives in memory of the caller: `nbytes` of it, read and written as a whole.
template <class T>
void def_memory(py::class_<T>& type) {
    type.def_property_readonly_static("nbytes", [](const py::object&) { return sizeof(T); })
        .def_static(
            "read", [](std::uintptr_t address) { return *pointer<T>(address); }, py::arg("address"))
        .def("write", [](const T& self, std::uintptr_t address) { *pointer<T>(address) = self; }, py::arg("address"));
}

}  // namespace

void register_loss_scale(py::module_& m) {
    py::class_<LossScaleState> state_type(m, "LossScaleState");
    state_type
        .def(py::init([](double scale, std::int64_t applied_steps, std::int64_t skipped_steps, std::int32_t good_steps,
                         std::int32_t hysteresis, std::int32_t consecutive_skips, bool at_minimum) {
                 return LossScaleState{scale,      applied_steps,     skipped_steps,     good_steps,
                                       hysteresis, consecutive_skips, at_minimum ? 1 : 0};
             }),
             py::arg("scale"), py::arg("applied_steps"), py::arg("skipped_steps"), py::arg("good_steps"),
             py::arg("hysteresis"), py::arg("consecutive_skips"), py::arg("at_minimum"))
        .def_readonly("scale", &LossScaleState::scale)
        .def_readonly("applied_steps", &LossScaleState::applied_steps)
        .def_readonly("skipped_steps", &LossScaleState::skipped_steps)
        .def_readonly("good_steps", &LossScaleState::good_steps)
        .def_readonly("hysteresis", &LossScaleState::hysteresis)
        .def_readonly("consecutive_skips", &LossScaleState::consecutive_skips)
        .def_property_readonly("at_minimum", [](const LossScaleState& s) { return s.at_minimum != 0; });
    def_memory(state_type);

    py::class_<StepControl> control_type(m, "StepControl");
    control_type
        .def(py::init([](double grad_norm, float grad_scale, bool skip, std::int64_t step) {
                 return StepControl{grad_norm, grad_scale, skip ? 1 : 0, step};
             }),
             py::arg("grad_norm"), py::arg("grad_scale"), py::arg("skip"), py::arg("step"))
        .def_readonly("grad_norm", &StepControl::grad_norm)
        .def_readonly("grad_scale", &StepControl::grad_scale)
        .def_property_readonly("skip", [](const StepControl& c) { return c.skip != 0; })
        .def_readonly("step", &StepControl::step);
    def_memory(control_type);

    py::class_<LossScaler>(m, "LossScaler")
        .def_property_readonly("dynamic", [](const LossScaler& s) { return s.config().dynamic; })
        .def(py::init([](bool dynamic, double initial_scale, double minimum, std::int32_t window,
                         std::int32_t hysteresis, bool consecutive_hysteresis) {
                 LossScaler::Config config;
                 config.dynamic = dynamic;
                 config.initial_scale = initial_scale;
                 config.minimum = minimum;
                 config.window = window;
                 config.hysteresis = hysteresis;
                 config.consecutive_hysteresis = consecutive_hysteresis;
                 return LossScaler(config);
             }),
             py::arg("dynamic"), py::arg("initial_scale"), py::arg("minimum"), py::arg("window"), py::arg("hysteresis"),
             py::arg("consecutive_hysteresis"))
        .def("initial", &LossScaler::initial)
        .def(
            "after_overflows",
            [](const LossScaler& self, LossScaleState state, int overflows) {
                for (int i = 0; i < overflows; ++i) self.update(state, true);
                return state;
            },
            py::arg("state"), py::arg("overflows"));

    m.def(
        "loss_scale_update",
        [](std::uintptr_t control, std::uintptr_t state, const LossScaler& scaler, std::uintptr_t sum_of_squares,
           double mean, double clip, std::optional<Stream> stream) {
            auto* step = pointer<StepControl>(control);
            auto* scale = pointer<LossScaleState>(state);
            const auto* sum = pointer<double>(sum_of_squares);
            if (stream) {
                loss_scale_update(step, scale, scaler, sum, mean, clip, *stream);
            } else {
                loss_scale_update(step, scale, scaler, sum, mean, clip);
            }
        },
        py::arg("control"), py::arg("state"), py::arg("scaler"), py::arg("sum_of_squares"), py::arg("mean"),
        py::arg("clip"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace partita::bindings
