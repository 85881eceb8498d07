#include "bindings.h"

PYBIND11_MODULE(_core, m) {
    using namespace partita::bindings;
    m.doc() = "The native core of Partita: loops over flat buffers, and state machines.";
    register_interruption(m);
    register_memory(m);
    register_copies(m);
    register_loss_scale(m);
    register_optimizer(m);
    register_bucketer(m);
    register_platform(m);
    register_shared_memory(m);
    register_files(m);
}
