"""Waits of the host for a device in which somebody may look around, and small values on their way between the two."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from partita.device.memory import HOST

Meanwhile = Callable[[], None]  # called again and again during a wait; may raise, which ends the wait
LOOK_EVERY_S = 0.05
QUESTIONS = 20  # before the first pause, some 20 microseconds: what is about done costs no sleep
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.00002, 0.001


def wait_until(done: Callable[[], bool], meanwhile: Meanwhile) -> None:
    """Returns when `done()` is true, and calls `meanwhile` every 50 ms until then. A signal's handler may end it, too.

    Waits of CUDA's own (`synchronize()`, `.item()`) do not return before the device is done, which is never if one of
    its collectives waits for a rank that has died.
    """
    if any(done() for _ in range(QUESTIONS)):
        return
    pause, looked = FIRST_PAUSE_S, time.monotonic()
    while not done():
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)
        if (now := time.monotonic()) - looked >= LOOK_EVERY_S:
            looked = now
            meanwhile()


def read_back(tensor: Tensor, meanwhile: Meanwhile) -> Tensor:
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
    wait_until(event.query, meanwhile)
    return host


def sent_to(device: torch.device, values: Tensor) -> Tensor:
    """Small values of the host on a device, where the current stream copies them: the host does not wait. On the host:
    the tensor itself."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)
