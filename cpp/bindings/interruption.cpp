#include "partita/interruption.h"

#include <exception>

#include "bindings.h"

namespace partita::bindings {

namespace {

// Lets the exception of the program's signal handler through, which is set already.
void translate_interruption(std::exception_ptr thrown) {
    try {
        if (thrown) std::rethrow_exception(thrown);
    } catch (const Interrupted&) {
        if (PyErr_Occurred() == nullptr) PyErr_SetNone(PyExc_KeyboardInterrupt);
    }
}

}  // namespace

bool is_interrupted() {
    if (PyGILState_GetThisThreadState() == nullptr) return false;
    const py::gil_scoped_acquire acquired;
    return PyErr_CheckSignals() != 0;
}

void register_interruption(py::module_&) { py::register_exception_translator(&translate_interruption); }

}  // namespace partita::bindings
