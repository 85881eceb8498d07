"""Communicators: the ranks of a job and how bytes move between them."""

from partita._core import CommunicationError, Reduction
from partita.comm.agree import any_rank, text_by_rank
from partita.comm.communicator import Communicator, Done, Handle, SingleProcess
from partita.comm.grid import ProcessGrid
from partita.comm.hierarchical import HierarchicalCommunicator
from partita.comm.setup import backend_for, communicator_of, init_distributed, world_communicator
from partita.comm.shared_memory import SharedMemoryCommunicator
from partita.comm.torch_transport import TorchCommunicator

__all__ = [
    "CommunicationError",
    "Communicator",
    "Done",
    "Handle",
    "HierarchicalCommunicator",
    "ProcessGrid",
    "Reduction",
    "SharedMemoryCommunicator",
    "SingleProcess",
    "TorchCommunicator",
    "any_rank",
    "backend_for",
    "communicator_of",
    "init_distributed",
    "text_by_rank",
    "world_communicator",
]
