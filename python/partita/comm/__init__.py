"""Communicators: the ranks of a job and how bytes move between them."""

from partita._core import CommunicationError, Reduction
from partita.comm.agree import (
    any_rank,
    any_rank_each,
    by_rank,
    numbers_by_rank,
    raise_together,
    ranks_that_differ,
    text_by_rank,
)
from partita.comm.calls import error_under_way
from partita.comm.communicator import Communicator, Done, Handle, SingleProcess
from partita.comm.grid import Connect, Coordinates, GridShape, ProcessGrid
from partita.comm.groups import backend_for
from partita.comm.hierarchical import HierarchicalCommunicator
from partita.comm.join import init_distributed, is_joined, join_job, leave_job, note_rank, place_in_job
from partita.comm.observed import Carried, Listener, Observed
from partita.comm.same import Entries, digest_number, require_same
from partita.comm.setup import communicator_of, require_same_on_all_ranks, world_communicator
from partita.comm.shared_memory import SharedMemoryCommunicator
from partita.comm.torch_transport import TorchCommunicator
from partita.comm.waited import Waited
from partita.comm.waits import WaitRow, WaitsLedger

__all__ = [
    "Carried",
    "CommunicationError",
    "Communicator",
    "Connect",
    "Coordinates",
    "Done",
    "Entries",
    "GridShape",
    "Handle",
    "HierarchicalCommunicator",
    "Listener",
    "Observed",
    "ProcessGrid",
    "Reduction",
    "SharedMemoryCommunicator",
    "SingleProcess",
    "TorchCommunicator",
    "WaitRow",
    "Waited",
    "WaitsLedger",
    "any_rank",
    "any_rank_each",
    "backend_for",
    "by_rank",
    "communicator_of",
    "digest_number",
    "error_under_way",
    "init_distributed",
    "is_joined",
    "join_job",
    "leave_job",
    "note_rank",
    "numbers_by_rank",
    "place_in_job",
    "raise_together",
    "ranks_that_differ",
    "require_same",
    "require_same_on_all_ranks",
    "text_by_rank",
    "world_communicator",
]
