"""Joining the ranks of a job."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]

from partita import _core
from partita.comm.agree import raise_together, text_by_rank
from partita.comm.choice import Meeting, Wish, connect
from partita.comm.communicator import Communicator, SingleProcess
from partita.comm.groups import GROUP_TIMEOUT, OwnGroups, backend_for
from partita.comm.torch_transport import TorchCommunicator, backend_of
from partita.device.memory import HOST

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def init_distributed(backend: str | None = None, timeout: timedelta = GROUP_TIMEOUT) -> None:
    """Makes the default process group, unless there is one.

    Under torchrun (or any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) all ranks join; in a plain
    `python train.py` the group is this process alone, without a socket and without NCCL.

    Args:
        backend: "nccl", "gloo", or another that torch.distributed knows; None: NCCL when this build has CUDA kernels
            and a GPU is there, otherwise gloo. A backend that cannot carry a model's tensors is no obstacle to
            training it.
        timeout: how long a collective waits for a rank before it raises.

    Raises:
        RuntimeError: some of the launcher's variables are set and some are missing.
    """
    if dist.is_initialized():
        return
    backend = backend or ("nccl" if _core.built_with_cuda() and torch.cuda.is_available() else "gloo")
    missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
    if not missing:
        dist.init_process_group(backend, timeout=timeout)
    elif "RANK" in missing and "WORLD_SIZE" in missing:  # alone, where NCCL and its threads have nothing to do
        alone = "gloo" if backend == "nccl" else backend
        dist.init_process_group(alone, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        present = [name for name in LAUNCHER_VARIABLES if name not in missing]
        raise RuntimeError(
            f"{', '.join(present)} set but {', '.join(missing)} missing in the environment: start the job with "
            "torchrun, which sets all four, or unset them to train in one process"
        )


def world_communicator(
    transport: str = "auto",
    timeout: timedelta = GROUP_TIMEOUT,
    device: torch.device = HOST,
    *,
    beside: Communicator | None = None,
    parts: Sequence[Sequence[int]] | None = None,
    host: str | None = None,
) -> Communicator:
    """The communicator of all ranks of the default process group, or of the part of them that this rank is in.

    A collective of all ranks of the job; see `communicator_of`. A default group that cannot carry the device's tensors
    (NCCL and a model on the CPU, say) gets one beside it that can. The process groups that are made for a communicator
    end with it.

    Args:
        beside: another communicator of the job. A group of its own is made, whose collectives have an order of their
            own. Over torch.distributed the two fail together: after a failure in one no collective of either begins.
        parts: disjoint, of all ranks of the job, each ascending, and the same on all ranks; the communicator is that of
            this rank's part. Shared memory that is asked for is no obstacle to a part whose ranks all have hosts of
            their own: such a part communicates over torch.distributed. None: the communicator of all ranks.
        host: equal on the ranks that share memory; None: found out.

    Raises:
        RuntimeError: there is no default process group, or as for `communicator_of`; with `parts` on all ranks of the
            job, if on those of one part.
    """
    group = dist.group.WORLD
    if group is None:
        raise RuntimeError("no process group: call init_distributed() first")
    wish = Wish(transport, timeout, device, host)
    if parts is not None:
        made = _part_communicator(parts, wish)
        _fail_together(made, beside)
        return made
    carrier = backend_of(group, device)
    carries = carrier is not None and (device.type != "cuda" or carrier != "gloo")
    if dist.get_world_size(group) == 1 or (carries and beside is None):
        return communicator_of(group, transport, timeout, device=device, host=host)
    own = OwnGroups()
    made = connect(own.make(backend_for(device)) or group, wish, own)
    _fail_together(made, beside)
    return made


def communicator_of(
    group: dist.ProcessGroup,
    transport: str,
    timeout: timedelta,
    *,
    device: torch.device = HOST,
    host: str | None = None,
) -> Communicator:
    """How the ranks of a process group communicate. A collective. The group outlives the communicator.

    Args:
        transport: "torch": through the process group. "shared_memory": through memory inside a host, through the
            process group between hosts. "auto": shared memory where it can be had.
        timeout: how long shared memory waits for a rank; the process group has its own.
        device: where the buffers are.
        host: equal on the ranks that share memory; None: found out.

    Raises:
        RuntimeError: "shared_memory" is asked for and cannot be had; says why.
    """
    return connect(group, Wish(transport, timeout, device, host), OwnGroups())


def _fail_together(made: Communicator, other: Communicator | None) -> None:
    if isinstance(made, TorchCommunicator) and isinstance(other, TorchCommunicator):
        made.failures = other.failures


def _part_communicator(parts: Sequence[Sequence[int]], wish: Wish) -> Communicator:
    """A collective of all ranks of the job: first all make the process groups of all parts, in one order."""
    own = OwnGroups()
    if not wish.tries_shared_memory:
        group, _ = _groups_of_parts(parts, None, own, backend_for(wish.device))
        return SingleProcess(wish.device) if group is None else connect(group, wish, own)
    with ExitStack() as on_failure, _settling() as everyone:
        on_failure.callback(own.end)
        meeting = Meeting.on(wish.host)
        group, leaders = _groups_of_parts(parts, text_by_rank(everyone, meeting.host), own, backend_for(wish.device))
        made: Communicator = SingleProcess(wish.device)
        error = None
        try:
            if group is not None:
                made = connect(group, wish, own, replace(meeting, leaders=leaders))
                on_failure.callback(made.close)
        except Exception as failure:
            error = failure
        raise_together(everyone, error, "a part of the job's ranks cannot communicate:")
        on_failure.pop_all()
        return made


@contextmanager
def _settling() -> Iterator[Communicator]:
    """All ranks of the job over torch.distributed, for tensors on the CPU.

    A rank that waits in vain for another one to join shared memory does so until the timeout of shared memory. Ranks
    that wait for that rank need more patience than shared memory has.
    """
    own = OwnGroups()
    default = dist.group.WORLD
    carries = default is not None and backend_of(default, HOST) is not None
    group = default if carries else own.make(backend_for(HOST))
    assert group is not None  # all ranks are in both
    try:
        yield TorchCommunicator(group)
    finally:
        own.end()


def _groups_of_parts(
    parts: Sequence[Sequence[int]], hosts: list[str] | None, own: OwnGroups, backend: str
) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """The process group of this rank's part, and that of its hosts' first ranks if this rank is one of them.

    Args:
        hosts: of all ranks of the job; None: they share no memory.
    """
    group = leaders = None
    with ExitStack() as on_failure:
        on_failure.callback(own.end)
        for ranks in parts:
            if len(ranks) == 1:
                continue
            group = own.make(backend, ranks) or group
            first = sorted({hosts[r]: r for r in reversed(ranks)}.values()) if hosts is not None else []
            if 1 < len(first) < len(ranks):
                leaders = own.make(backend, first) or leaders
        on_failure.pop_all()
    return group, leaders
