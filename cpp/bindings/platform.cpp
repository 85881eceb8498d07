#include "bindings.h"
#include "partita/cpu_level.h"
#include "partita/cuda_device.h"

namespace partita::bindings {

void register_platform(py::module_& m) {
    m.def("cpu_level", [] { return name_of(best_cpu_level()); });
    m.def("built_with_cuda", &built_with_cuda);
    m.def("cuda_device_count", &cuda_device_count);
}

}  // namespace partita::bindings
