#pragma once

namespace partita {

// Where CUDA work is queued. Functions that take a Stream in place of a number of threads do the same work on that
// device: pointers are the device's, calls return before the work is done, and errors of the CUDA runtime are thrown
// as std::runtime_error with the function's name. A build without CUDA throws from all of them.
struct Stream {
    int device = 0;
    void* handle = nullptr;  // a cudaStream_t of that device; null: its default stream
};

}  // namespace partita
