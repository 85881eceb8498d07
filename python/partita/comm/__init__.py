"""Communicators: the ranks of a job and how bytes move between them."""

from partita.comm.communicator import Communicator, Handle, SingleProcess
from partita.comm.setup import init_distributed, world_communicator
from partita.comm.torch_transport import TorchCommunicator

__all__ = ["Communicator", "Handle", "SingleProcess", "TorchCommunicator", "init_distributed", "world_communicator"]
