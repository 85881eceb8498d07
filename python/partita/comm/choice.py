"""How the ranks of one process group communicate: over shared memory where it can be had, or through the group."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from partita import _core
from partita.comm.agree import any_rank
from partita.comm.communicator import Communicator, SingleProcess
from partita.comm.fate import Fate
from partita.comm.groups import GROUP_TIMEOUT, OwnGroups, backend_for
from partita.comm.hierarchical import HierarchicalCommunicator
from partita.comm.hosts import Contact, exchange_contacts, no_host, ranks_by_host, this_host
from partita.comm.shared_memory import SharedMemoryCommunicator
from partita.comm.torch_transport import TorchCommunicator

logger = logging.getLogger("partita")


@dataclass(frozen=True)
class Wish:
    """What `communicator_of` is asked for."""

    transport: str
    timeout: timedelta
    device: torch.device
    host: str | None
    fate: Fate | None = None  # of a communicator that fails together with this one

    @property
    def tries_shared_memory(self) -> bool:
        """Whether the ranks of a host are to share memory if they can."""
        return self.transport != "torch" and self.device.type == "cpu"

    def over_torch(
        self, group: dist.ProcessGroup, own: OwnGroups, downwards: dist.ProcessGroup | None = None
    ) -> TorchCommunicator:
        """The communicator of a group's ranks through the group."""
        return TorchCommunicator(group, self.device, own, timeout=self.timeout, fate=self.fate, downwards=downwards)


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of a host find this one, and who speaks for the hosts.

    Attributes:
        leaders: the group of the hosts' first ranks, on those ranks, where all ranks of the job have made it before.
    """

    listener: _core.Listener | None
    host: str
    leaders: dist.ProcessGroup | None = None

    @staticmethod
    def on(host: str | None) -> Meeting:
        """In a sandbox without Unix sockets, say, this process is on a host of its own, and the others hear of it."""
        try:
            return Meeting(_core.Listener(), host or this_host())
        except RuntimeError:
            return Meeting(None, no_host())


class _UnavailableError(Exception):
    """Shared memory is not for these ranks. Raised on all ranks together."""


class _FailedError(_UnavailableError):
    """Shared memory is for these ranks, and does not work."""


def connect(
    group: dist.ProcessGroup,
    wish: Wish,
    own: OwnGroups,
    part: Meeting | None = None,
    downwards: dist.ProcessGroup | None = None,
) -> Communicator:
    """The communicator of a group's ranks. The groups in `own` end with the communicator, or with its failure.

    Args:
        part: of a rank whose group is a part of the job; None: the group has all ranks, or the program has made it.
        downwards: see `TorchCommunicator`.
    """
    with ExitStack() as on_failure:
        on_failure.callback(own.end)
        made = _choose(group, wish, own, part, downwards)
        on_failure.callback(made.close)
        if own.are_there and isinstance(made, SharedMemoryCommunicator):  # which communicates through none of them
            made.barrier()  # every rank has read from the groups what it needs
            own.end()
        on_failure.pop_all()
        return made


def _choose(
    group: dist.ProcessGroup,
    wish: Wish,
    own: OwnGroups,
    part: Meeting | None,
    downwards: dist.ProcessGroup | None,
) -> Communicator:
    if dist.get_world_size(group) == 1:
        own.end()
        return SingleProcess(wish.device)
    if wish.transport == "torch":
        return wish.over_torch(group, own, downwards)
    try:
        if not wish.tries_shared_memory:
            raise _UnavailableError(f"the ranks compute on '{wish.device.type}'")
        return _over_shared_memory(group, wish, own, part)
    except _UnavailableError as error:
        failed = isinstance(error, _FailedError)
        alone_on_hosts = part is not None and not failed
        if wish.transport == "shared_memory" and not alone_on_hosts:
            raise RuntimeError(f'comm.transport is "shared_memory", but {error}') from error
        if failed:
            logger.warning("%s; going on over torch.distributed", error)
        return wish.over_torch(group, own, downwards)


def _over_shared_memory(
    group: dist.ProcessGroup, wish: Wish, own: OwnGroups, part: Meeting | None
) -> SharedMemoryCommunicator | HierarchicalCommunicator:
    rank = dist.get_rank(group)
    meeting = part or Meeting.on(wish.host)
    listener, timeout = meeting.listener, wish.timeout
    everyone = TorchCommunicator(group)
    contacts = exchange_contacts(everyone, meeting.host, listener.address if listener else b"")
    hosts = ranks_by_host(contacts)
    if len(hosts) == len(contacts):
        raise _UnavailableError("no two ranks share a host")
    ranks = next(ranks for ranks in hosts if rank in ranks)
    if len(hosts) > 1:
        if part is None and dist.get_world_size(group) < dist.get_world_size():
            # The group of the hosts' first ranks must be made by all ranks of the job.
            raise _UnavailableError("a part of the job's ranks is on several hosts")
        timeout += GROUP_TIMEOUT  # the leader of a host may be waiting for another host
    inside = _join(everyone, listener, ranks.index(rank), [contacts[r] for r in ranks], timeout)
    if len(hosts) == 1:
        return inside
    with ExitStack() as on_failure:
        on_failure.callback(inside.close)
        first = [dist.get_global_rank(group, ranks[0]) for ranks in hosts]
        leaders = own.make(backend_for(wish.device), first) if part is None else part.leaders
        between = TorchCommunicator(leaders) if leaders is not None else None
        made = HierarchicalCommunicator(rank, hosts, inside, between, TorchCommunicator(group, own=own))
        on_failure.pop_all()
    return made


def _join(
    everyone: Communicator, listener: _core.Listener | None, rank: int, contacts: list[Contact], timeout: timedelta
) -> SharedMemoryCommunicator:
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
    if any_rank(everyone, made is None) or made is None:
        raise _FailedError(reason)
    return SharedMemoryCommunicator(made)
