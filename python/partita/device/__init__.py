"""Memory, streams and native kernels of a device."""

from partita.device.memory import HOST, FreedMemory, flat_buffer, host_buffer
from partita.device.streams import AcrossStreams, HostCopy, HostStreams, Streams, streams_of

__all__ = [
    "HOST",
    "AcrossStreams",
    "FreedMemory",
    "HostCopy",
    "HostStreams",
    "Streams",
    "flat_buffer",
    "host_buffer",
    "streams_of",
]
