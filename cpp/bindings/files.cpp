#include <utility>

#include "bindings.h"
#include "partita/digest.h"
#include "partita/file_queue.h"

namespace partita::bindings {

namespace {

using release = py::call_guard<py::gil_scoped_release>;

std::vector<std::pair<int, std::uint64_t>> wait(FileQueue& queue, std::optional<std::int64_t> count) {
    std::vector<std::pair<int, std::uint64_t>> pairs;
    for (const FileResult& result : queue.wait(count)) pairs.emplace_back(result.error, result.digest);
    return pairs;
}

}  // namespace

void register_files(py::module_& m) {
    m.def(
        "xxh3_64",
        [](std::uintptr_t address, std::int64_t nbytes) {
            if (nbytes < 0) throw std::invalid_argument("nbytes must not be negative: " + std::to_string(nbytes));
            return xxh3_64(pointer<const void>(address), nbytes);
        },
        py::arg("address"), py::arg("nbytes"), release());
    py::class_<FileQueue>(m, "FileQueue")
        .def(py::init([](int threads) { return std::make_unique<FileQueue>(threads, is_interrupted); }),
             py::arg("threads"))
        .def(
            "write",
            [](FileQueue& queue, int fd, std::int64_t offset, std::uintptr_t address, std::int64_t nbytes, int direct) {
                return queue.write(fd, offset, pointer<const void>(address), nbytes, direct);
            },
            py::arg("fd"), py::arg("offset"), py::arg("address"), py::arg("nbytes"), py::arg("direct") = -1)
        .def(
            "read",
            [](FileQueue& queue, int fd, std::int64_t offset, std::uintptr_t address, std::int64_t nbytes) {
                return queue.read(fd, offset, pointer<void>(address), nbytes);
            },
            py::arg("fd"), py::arg("offset"), py::arg("address"), py::arg("nbytes"))
        .def(
            "read_part",
            [](FileQueue& queue, int fd, std::int64_t offset, std::int64_t nbytes, std::int64_t first,
               std::uintptr_t address,
               std::int64_t kept) { return queue.read_part(fd, offset, nbytes, first, pointer<void>(address), kept); },
            py::arg("fd"), py::arg("offset"), py::arg("nbytes"), py::arg("first"), py::arg("address"), py::arg("kept"))
        .def("sync", &FileQueue::sync, py::arg("fd"))
        .def(
            "take_over",
            [](FileQueue& queue, std::int64_t first, std::int64_t last, std::uintptr_t address) {
                return queue.take_over(first, last, pointer<void>(address));
            },
            py::arg("first"), py::arg("last"), py::arg("address"), release())
        .def("wait", &wait, py::arg("count") = py::none(), release())
        .def("idle", &FileQueue::idle, release());
}

}  // namespace partita::bindings
