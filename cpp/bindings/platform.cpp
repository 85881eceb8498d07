#include "bindings.h"
#include "partita/cpu_level.h"
#include "partita/cuda_device.h"

namespace partita::bindings {

void register_platform(py::module_& m) {
    m.def("cpu_level", [] { return name_of(best_cpu_level()); });
    m.def("built_with_cuda", &built_with_cuda);
    m.def("cuda_device_count", &cuda_device_count);
    m.def("cuda_versions", [] {
        const CudaVersions versions = cuda_versions();
        return py::make_tuple(versions.driver, versions.runtime);
    });
    m.def("cuda_architectures", &cuda_architectures);
    m.def("load_cuda_kernels", &load_cuda_kernels, py::arg("device"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace partita::bindings
