"""One process that works as a rank of several: it communicates, gathers what stage 3 partitions, and waits in vain for
nobody. Its collectives can be late."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

import inside
import torch
from late_streams import on_late_streams
from partita.comm import Communicator, TorchCommunicator
from partita.comm.communicator import Handle
from partita.comm.groups import OwnGroups
from partita.units import Lifetime, StagePolicy
from torch import Tensor

LATE_CYCLES = 2_000_000  # of the GPU's clock, some 1 ms
Launch = Callable[..., Handle]


def native_communicator(device: torch.device, backend: str) -> Communicator:
    """All ranks of the job over whole collectives of a backend, as NCCL's are: those of gloo carry tensors of a GPU,
    too, through the host."""
    own = OwnGroups()
    group = own.make(backend)
    assert group is not None  # all ranks are in it
    with inside.whole_collectives():
        return TorchCommunicator(group, device, own)


def over(device: torch.device, backend: str) -> AbstractContextManager[Any]:
    """Engines made in this block communicate over whole collectives of a backend, however many ranks there are."""
    return inside.with_connect(lambda *_args, **_kwargs: native_communicator(device, backend))


def gathering() -> AbstractContextManager[Any]:
    """Engines made in this block gather in stage 3 although they are alone."""

    def lifetime(policy: StagePolicy, **_ranks: Any) -> Lifetime:
        return Lifetime.GATHERED if policy.shards_params else Lifetime.ALWAYS

    return mock.patch.object(StagePolicy, "lifetime", lifetime)


@contextmanager
def as_several_ranks(device: torch.device, *, late: bool = False) -> Iterator[None]:
    """Engines made in this block communicate and gather although they are alone.

    Args:
        late: collectives begin later than they could, and while they are under way their buffers hold NaN: who does not
            wait sees it (G1). On a GPU the stream is late, on the CPU the collective begins when somebody waits for it,
            and the engine believes that its device works by itself.
    """
    cuda = device.type == "cuda"
    with ExitStack() as exits:
        exits.enter_context(over(device, "nccl" if cuda else "gloo"))
        exits.enter_context(gathering())
        if late:
            launch = _late_on_a_gpu if cuda else _late_on_the_cpu
            exits.enter_context(mock.patch.object(TorchCommunicator, "_launch", launch(TorchCommunicator._launch)))
            if not cuda:
                exits.enter_context(on_late_streams())
        yield


def _garbage(buffer: Tensor) -> Callable[[], None]:
    """Puts NaN into a buffer; returns what brings its content back. Nothing counts either as a write of the program."""
    raw = buffer.data.view(-1).view(torch.uint8)
    content = raw.clone()
    raw.fill_(0xFF)

    def restore() -> None:
        raw.copy_(content)
        if raw.device.type == "cuda":
            content.record_stream(torch.cuda.current_stream(raw.device))

    return restore


def _late_on_a_gpu(launch: Launch) -> Launch:
    streams: dict[int, torch.cuda.Stream] = {}

    def launch_late(self: TorchCommunicator, name: str, buffer: Tensor, *args: Any, **kwargs: Any) -> Handle:
        if not buffer.numel():
            return launch(self, name, buffer, *args, **kwargs)
        restore = _garbage(buffer)
        stream = streams.setdefault(id(self), torch.cuda.Stream(self.device))
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            torch.cuda._sleep(LATE_CYCLES)
            restore()
            return launch(self, name, buffer, *args, **kwargs)

    return launch_late


def _late_on_the_cpu(launch: Launch) -> Launch:
    def launch_late(self: TorchCommunicator, name: str, buffer: Tensor, *args: Any, **kwargs: Any) -> Handle:
        restore = _garbage(buffer)

        def begin() -> Handle:
            restore()
            return launch(self, name, buffer, *args, **kwargs)

        return _Postponed(begin)

    return launch_late


class _Postponed:
    """A collective that begins when somebody waits for it; one rank alone can do that."""

    def __init__(self, begin: Callable[[], Handle]) -> None:
        self._begin: Callable[[], Handle] | None = begin

    def wait(self) -> None:
        begin, self._begin = self._begin, None
        if begin is not None:
            begin().wait()
