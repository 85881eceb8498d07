"""Process groups of torch.distributed that live as long as the communicator they were made for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from partita.comm.fate import Fate

GROUP_TIMEOUT = timedelta(minutes=10)  # of torch.distributed, unless the program says otherwise
# The thread that watches NCCL ends the process when a collective is not done so long after its launch. A wait of the
# host raises, and says which rank is at fault; it must come first, though it begins later.
WATCHDOG_FACTOR, WATCHDOG_MARGIN = 1.25, timedelta(minutes=1)


def backend_for(device: torch.device) -> str:
    """The backend of torch.distributed that is best for a device's tensors."""
    return "nccl" if device.type == "cuda" else "gloo"


def backend_of(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """What carries a device's tensors in a group (which may have a backend per kind of device); None: nothing does."""
    try:
        return str(group._get_backend(torch.device(device.type)).name())
    except RuntimeError:
        return None


def has_nccl(group: dist.ProcessGroup) -> bool:
    """Whether NCCL carries the tensors of GPUs in a group."""
    return backend_of(group, torch.device("cuda")) == "nccl"


def set_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Tells NCCL's watchdog in a group how long waits of the host last. Does nothing without NCCL."""
    if has_nccl(group):
        backend = group._get_backend(torch.device("cuda"))
        with suppress(AttributeError):  # a wrapper of TORCH_DISTRIBUTED_DEBUG
            backend._set_default_timeout(_watchdog_timeout(timeout))


def host_patience_s(group: dist.ProcessGroup, timeout: timedelta) -> float:
    """How long the host waits for a collective of a group: `timeout`, and no longer than NCCL's watchdog waits."""
    own: timedelta | None = None
    if has_nccl(group):
        options = getattr(group._get_backend(torch.device("cuda")), "options", None)
        own = getattr(options, "_timeout", None)
    return (timeout if own is None else min(timeout, own / WATCHDOG_FACTOR)).total_seconds()


class OwnGroups:
    """The process groups that were made for one communicator. The default group, and those of the program, are none.

    Args:
        timeout: `comm.timeout_seconds`. Gloo's own is longer: its collectives wait for ranks that may be waiting so
            long for shared memory.
    """

    def __init__(self, timeout: timedelta = GROUP_TIMEOUT) -> None:
        self._timeout = timeout
        self._groups: list[dist.ProcessGroup] = []

    @property
    def are_there(self) -> bool:
        """Whether there are any that have not ended."""
        return bool(self._groups)

    def make(self, backend: str, ranks: Sequence[int] | None = None) -> dist.ProcessGroup | None:
        """A group of these ranks of the job (None: of all); None on a rank that is not among them.

        No GPU is touched here: without `device_id` NCCL begins with the first collective, on its tensor's device. With
        one, messages between ranks would wait for each other in one queue. So the group is bound to no GPU, even where
        the program has bound the default group to one.

        A collective of ALL ranks of the job: torch.distributed numbers groups on each rank, by the calls there.
        """
        timeout = _watchdog_timeout(self._timeout) if backend == "nccl" else self._timeout + GROUP_TIMEOUT
        with _default_unbound():
            made = dist.new_group(None if ranks is None else list(ranks), backend=backend, timeout=timeout)
        if not isinstance(made, dist.ProcessGroup):
            return None
        self._groups.append(made)
        return made

    def give_up(self) -> None:
        """Ends the groups without their other ranks, which may be waiting for this one: NCCL is aborted."""
        fate = Fate()
        for group in filter(has_nccl, self._groups):
            fate.concerns(group)
        fate.fail("it has left with an error")
        self.end(fate)

    def end(self, fate: Fate | None = None) -> None:
        """Ends the groups; a second call does nothing. Other ranks may be later, or dead. The end of NCCL waits until
        the ranks of its host have ended it, too, or are gone: all end their groups at one place of the program.

        Args:
            fate: of their communicator. After a failure NCCL was aborted, else all that was launched is done: its end
                waits for kernels, and a kernel may wait for another rank.
        """
        groups, self._groups = self._groups, []
        if groups and fate is not None and fate.failures and not fate.is_over():
            return  # the end of a group would wait for its abort
        for group in reversed(groups):
            with suppress(ValueError):  # the program has ended all groups of torch.distributed before
                dist.destroy_process_group(group)


@contextmanager
def _default_unbound() -> Iterator[None]:
    """In this block the default group is bound to no GPU, which new groups would be bound to as well."""
    default = dist.group.WORLD
    assert default is not None
    bound, default.bound_device_id = default.bound_device_id, None
    try:
        yield
    finally:
        default.bound_device_id = bound


def _watchdog_timeout(timeout: timedelta) -> timedelta:
    return timeout * WATCHDOG_FACTOR + WATCHDOG_MARGIN
