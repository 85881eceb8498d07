"""Small values on their way between the host and a device; a host that waits for them looks around meanwhile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from partita.device.memory import HOST
from partita.device.streams import poll


def read_back(tensor: Tensor, meanwhile: Callable[[], None]) -> Tensor:
    """The values of a small tensor in host memory, once the current stream has come to them. On the host: the tensor
    itself.

    CUDA's own waits (`.item()`, `.tolist()`) do not return before the device is done, which is never if one of its
    collectives waits for a rank that has died.

    Args:
        meanwhile: called at least every 50 ms; what it raises ends the wait.
    """
    if tensor.is_cpu:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device=HOST, pin_memory=True)
    host.copy_(tensor.detach(), non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(tensor.device))
    poll(event.query, meanwhile)
    return host


def sent_to(device: torch.device, values: Tensor) -> Tensor:
    """Small values of the host on a device, where the current stream copies them: the host does not wait. On the host:
    the tensor itself."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)
