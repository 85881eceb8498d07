"""The communicators of a job's ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from partita.comm.agree import raise_together, text_by_rank
from partita.comm.choice import Meeting, Wish, connect
from partita.comm.communicator import Communicator, SingleProcess
from partita.comm.groups import GROUP_TIMEOUT, OwnGroups, backend_for, backend_of
from partita.comm.same import Entries, require_same
from partita.comm.torch_transport import TorchCommunicator
from partita.device.memory import HOST


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
    wish = Wish(transport, timeout, device, host, beside.fate if isinstance(beside, TorchCommunicator) else None)
    if parts is not None:
        return _part_communicator(parts, wish)
    carrier = backend_of(group, device)
    carries = carrier is not None and (device.type != "cuda" or carrier != "gloo")
    if dist.get_world_size(group) == 1 or (carries and beside is None):
        return communicator_of(group, transport, timeout, device=device, host=host)
    own = OwnGroups(timeout)
    return connect(own.make(backend_for(device)) or group, wish, own)


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
    return connect(group, Wish(transport, timeout, device, host), OwnGroups(timeout))


def _part_communicator(parts: Sequence[Sequence[int]], wish: Wish) -> Communicator:
    """A collective of all ranks of the job: first all make the process groups of all parts, in one order."""
    own = OwnGroups(wish.timeout)
    if not wish.tries_shared_memory:
        backend = backend_for(wish.device)
        group, _ = _groups_of_parts(parts, None, own, backend)
        # After all groups of the other kind, in the same order on all ranks.
        downwards = _groups_of_parts(parts, None, own, backend)[0] if backend == "nccl" else None
        return SingleProcess(wish.device) if group is None else connect(group, wish, own, downwards=downwards)
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


def require_same_on_all_ranks(entries: Entries, device: torch.device) -> None:
    """Raises on all ranks of the job unless all have the same entries, see `require_same`. A collective, and the first
    one: it is the same whatever the ranks were given.

    Args:
        device: of what is to be trained; on a GPU the entries may travel as the model's tensors will.
    """
    if dist.get_world_size() > 1:
        with _settling(device) as everyone:
            require_same(everyone, entries)


@contextmanager
def _settling(device: torch.device = HOST) -> Iterator[Communicator]:
    """All ranks of the job over torch.distributed: for tensors on the CPU, or else on `device`.

    A rank that waits in vain for another one to join shared memory does so until the timeout of shared memory. Ranks
    that wait for that rank need more patience than shared memory has.
    """
    own = OwnGroups()
    default = dist.group.WORLD
    assert default is not None
    carried = [d for d in (HOST, device) if backend_of(default, d) is not None]
    group = default if carried else own.make(backend_for(HOST))
    assert group is not None  # all ranks are in both
    try:
        yield TorchCommunicator(group, carried[0] if carried else HOST)
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
