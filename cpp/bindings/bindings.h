// One function per subject adds its names to the module.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

namespace partita::bindings {

namespace py = pybind11;

// Addresses cross the border as integers; Python checks what they point to before it hands them over.
template <class T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// For waits of the core. Runs what the program wants to be done about a signal. Only the main thread can; the core's
// own threads know no Python. True: that raised, and the exception is set on this thread.
bool is_interrupted();

void register_memory(py::module_& m);
void register_copies(py::module_& m);
void register_optimizer(py::module_& m);
void register_loss_scale(py::module_& m);
void register_bucketer(py::module_& m);
void register_platform(py::module_& m);
void register_shared_memory(py::module_& m);
void register_files(py::module_& m);
void register_interruption(py::module_& m);  // the exception of waits that is_interrupted() ends

}  // namespace partita::bindings
