"""Communicators: the ranks of a job and how bytes move between them."""

from partita._core import CommunicationError, Reduction
from partita.comm.communicator import Communicator, Done, Handle, SingleProcess
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
    "Reduction",
    "SharedMemoryCommunicator",
    "SingleProcess",
    "TorchCommunicator",
    "backend_for",
    "communicator_of",
    "init_distributed",
    "world_communicator",
]
