"""Joining the ranks of a job."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

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
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # Open MPI, MPICH and Intel MPI, MVAPICH


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int | None = None,
    verbose: bool = True,
    timeout: timedelta = GROUP_TIMEOUT,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
    *,
    backend: str | None = None,
) -> None:
    """Makes the default process group, unless there is one. The parameters have DeepSpeed's names and order.

    Under torchrun (or any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) all ranks join; in a plain
    `python train.py` the group is this process alone, without a socket and without NCCL.

    Args:
        dist_backend: "nccl", "gloo", or another that torch.distributed knows; None: NCCL when this build has CUDA
            kernels and a GPU is there, otherwise gloo. A backend that cannot carry a model's tensors is no obstacle to
            training it.
        auto_mpi_discovery: whether processes that MPI started without the launcher's variables are an error; False:
            each of them is alone.
        distributed_port: the port of rank 0 where the launcher set no MASTER_PORT.
        verbose, config: not used: nothing is printed, and there is no log of collectives.
        timeout: how long a collective waits for a rank before it raises.
        init_method, rank, world_size: as for `torch.distributed.init_process_group`, in place of the launcher's.
        dist_init_required: False: the group must be there.
        backend: another name of dist_backend.

    Raises:
        RuntimeError: some of the launcher's variables are set and some are missing; there is no group, and none is to
            be made.
        TypeError: an argument is of another type; names it.
    """
    given = dist_backend or backend
    _check_types(given, auto_mpi_discovery, distributed_port, timeout)
    if dist.is_initialized():
        return
    if dist_init_required is False:
        raise RuntimeError(
            "dist_init_required=False, and there is no process group: call torch.distributed.init_process_group() "
            "before, or leave dist_init_required out"
        )
    chosen = given or ("nccl" if _core.built_with_cuda() and torch.cuda.is_available() else "gloo")
    if init_method is not None or rank >= 0 or world_size >= 0:
        own = [number if number >= 0 else int(os.environ.get(name, -1)) for number, name in _numbers(rank, world_size)]
        dist.init_process_group(chosen, init_method=init_method, rank=own[0], world_size=own[1], timeout=timeout)
    else:
        _join_launched(chosen, timeout, distributed_port, may_be_mpi=auto_mpi_discovery)


def _numbers(rank: int, world_size: int) -> list[tuple[int, str]]:
    return [(rank, "RANK"), (world_size, "WORLD_SIZE")]


def _check_types(backend: object, mpi: object, port: object, timeout: object) -> None:
    checks = (
        ("dist_backend", backend, str | None, '"nccl" or "gloo", say'),
        ("auto_mpi_discovery", mpi, bool, "a bool; give timeout= by its name"),
        ("distributed_port", port, int | None, "a number"),
        ("timeout", timeout, timedelta, "a datetime.timedelta"),
    )
    for name, value, kind, rule in checks:
        if not isinstance(value, kind):
            raise TypeError(f"init_distributed(): {name} must be {rule}, got {value!r}")


def _join_launched(backend: str, timeout: timedelta, port: int | None, *, may_be_mpi: bool) -> None:
    """Joins the ranks that a launcher started, or is alone without a launcher."""
    missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
    if not missing:
        dist.init_process_group(backend, timeout=timeout)
    elif missing == ["MASTER_PORT"] and port is not None:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        address = f"tcp://{os.environ['MASTER_ADDR']}:{port}"
        dist.init_process_group(backend, init_method=address, rank=rank, world_size=world_size, timeout=timeout)
    elif "RANK" in missing and "WORLD_SIZE" in missing:  # alone, where NCCL and its threads have nothing to do
        if may_be_mpi:
            _refuse_mpi()
        alone = "gloo" if backend == "nccl" else backend
        dist.init_process_group(alone, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        present = [name for name in LAUNCHER_VARIABLES if name not in missing]
        raise RuntimeError(
            f"{', '.join(present)} set but {', '.join(missing)} missing in the environment: start the job with "
            "torchrun, which sets all four, or unset them to train in one process"
        )


def _refuse_mpi() -> None:
    """Processes of mpirun know of each other, and would each train alone."""
    for name in MPI_SIZES:
        if os.environ.get(name, "1") not in ("0", "1"):
            raise RuntimeError(
                f"{name} = {os.environ[name]}: MPI started several processes, and {', '.join(LAUNCHER_VARIABLES)} are "
                "not set, so each would train alone: start the job with torchrun, set the four variables from MPI's, "
                "or call partita.init_distributed(auto_mpi_discovery=False) if each is to train alone"
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
