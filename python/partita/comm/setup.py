"""Joining the ranks of a job."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]

from partita import _core
from partita.comm.communicator import Communicator, SingleProcess
from partita.comm.hierarchical import HierarchicalCommunicator
from partita.comm.hosts import Contact, exchange_contacts, no_host, ranks_by_host, this_host
from partita.comm.shared_memory import SharedMemoryCommunicator
from partita.comm.torch_transport import TorchCommunicator, backend_of
from partita.device.memory import HOST

logger = logging.getLogger("partita")

GROUP_TIMEOUT = timedelta(minutes=10)  # of torch.distributed, unless the program says otherwise
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
    timeout: timedelta = timedelta(seconds=30),
    device: torch.device = HOST,
    *,
    beside: Communicator | None = None,
) -> Communicator:
    """The communicator of all ranks of the default process group; see `communicator_of`.

    A default group that cannot carry the device's tensors (NCCL and a model on the CPU, say) gets one beside it that
    can. `beside`: another communicator of the same ranks; a group of its own is made, whose collectives have an order
    of their own.
    """
    group = dist.group.WORLD
    if group is None:
        raise RuntimeError("no process group: call init_distributed() first")
    carrier = backend_of(group, device)
    carries = carrier is not None and (device.type != "cuda" or carrier != "gloo")
    if dist.get_world_size(group) == 1 or (carries and beside is None):
        return communicator_of(group, transport, timeout, device=device)
    made = communicator_of(dist.new_group(backend=backend_for(device)), transport, timeout, device=device)
    if isinstance(made, TorchCommunicator):
        made.owns_group = True
        if isinstance(beside, TorchCommunicator):
            made.failures = beside.failures
    return made


def backend_for(device: torch.device) -> str:
    """The backend of torch.distributed that is best for a device's tensors."""
    return "nccl" if device.type == "cuda" else "gloo"


def communicator_of(
    group: dist.ProcessGroup,
    transport: str,
    timeout: timedelta,
    *,
    device: torch.device = HOST,
    host: str | None = None,
) -> Communicator:
    """How the ranks of a process group communicate. A collective.

    Args:
        transport: "torch": through the process group. "shared_memory": through memory inside a host, through the
            process group between hosts. "auto": shared memory where it can be had.
        timeout: how long shared memory waits for a rank; the process group has its own.
        device: where the buffers are.
        host: equal on the ranks that share memory; None: found out.

    Raises:
        RuntimeError: "shared_memory" is asked for and cannot be had; says why.
    """
    if dist.get_world_size(group) == 1:
        return SingleProcess(device)
    if transport == "torch":
        return TorchCommunicator(group, device)
    try:
        if device.type != "cpu":
            raise _UnavailableError(f"the ranks compute on '{device.type}'", is_a_failure=False)
        return _over_shared_memory(group, timeout, host or this_host())
    except _UnavailableError as error:
        if transport == "shared_memory":
            raise RuntimeError(f'comm.transport is "shared_memory", but {error}') from error
        if error.is_a_failure:
            logger.warning("%s; going on over torch.distributed", error)
        return TorchCommunicator(group, device)


class _UnavailableError(Exception):
    """Raised on all ranks together."""

    def __init__(self, reason: str, *, is_a_failure: bool) -> None:
        super().__init__(reason)
        self.is_a_failure = is_a_failure


def _over_shared_memory(group: dist.ProcessGroup, timeout: timedelta, host: str) -> Communicator:
    rank = dist.get_rank(group)
    listener = None
    with suppress(RuntimeError):  # a sandbox without Unix sockets, say; the others must hear of it
        listener = _core.Listener()
    contacts = exchange_contacts(group, host if listener else no_host(), listener.address if listener else b"")
    hosts = ranks_by_host(contacts)
    if len(hosts) == len(contacts):
        raise _UnavailableError("no two ranks share a host", is_a_failure=False)
    ranks = next(ranks for ranks in hosts if rank in ranks)
    if len(hosts) > 1:
        if dist.get_world_size(group) < dist.get_world_size():  # a group of leaders is made by all ranks of the job
            raise _UnavailableError("a part of the job's ranks is on several hosts", is_a_failure=False)
        timeout += GROUP_TIMEOUT  # the leader of a host may be waiting for another host
    inside = _join(group, listener, ranks.index(rank), [contacts[r] for r in ranks], timeout)
    if len(hosts) == 1:
        return inside
    leaders = dist.new_group([dist.get_global_rank(group, ranks[0]) for ranks in hosts])
    between = TorchCommunicator(leaders) if rank == ranks[0] else None
    return HierarchicalCommunicator(rank, hosts, inside, between, TorchCommunicator(group))


def _join(
    group: dist.ProcessGroup, listener: _core.Listener | None, rank: int, contacts: list[Contact], timeout: timedelta
) -> Communicator:
    """The ranks of this host over shared memory, if that works on every host."""
    made, reason = None, "another rank could not join a group over shared memory"
    try:
        if listener is None:
            raise RuntimeError("no Unix socket can be made")
        addresses, token = [contact.address for contact in contacts], contacts[0].token
        threads = torch.get_num_threads()
        made = _core.SharedMemoryGroup(listener, rank, addresses, token, timeout.total_seconds(), threads)
    except (RuntimeError, MemoryError) as error:
        reason = f"shared memory between processes does not work here: {error}"
        if listener is not None:
            listener.close()  # so that no rank waits for this one
    everywhere = torch.tensor(int(made is not None))
    dist.all_reduce(everywhere, dist.ReduceOp.MIN, group=group)
    if made is None or not everywhere.item():
        raise _UnavailableError(reason, is_a_failure=True)
    return SharedMemoryCommunicator(made)
