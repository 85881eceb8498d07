"""Memory, streams and native kernels of a device."""

from partita.device.memory import HOST, FreedMemory, flat_buffer, host_buffer
from partita.device.streams import AcrossStreams, HostCopy, HostStreams, Streams, streams_of
from partita.device.threads import Cores, own_cores, threads_for, torch_threads

__all__ = [
    "HOST",
    "AcrossStreams",
    "Cores",
    "FreedMemory",
    "HostCopy",
    "HostStreams",
    "Streams",
    "flat_buffer",
    "host_buffer",
    "own_cores",
    "streams_of",
    "threads_for",
    "torch_threads",
]
