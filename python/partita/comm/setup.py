"""Joining the ranks of a job."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]

from partita import _core
from partita.comm.communicator import Communicator, SingleProcess
from partita.comm.torch_transport import TorchCommunicator

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def init_distributed(backend: str | None = None, timeout: timedelta = timedelta(minutes=10)) -> None:
    """Makes the default process group, unless there is one.

    Under torchrun (or any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) all ranks join; in a plain
    `python train.py` the group is this process alone, without a socket.

    Args:
        backend: "nccl", "gloo", or another that torch.distributed knows; None: NCCL when this build has CUDA kernels
        and
            a GPU is there, otherwise gloo.
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
    elif "RANK" in missing and "WORLD_SIZE" in missing:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        present = [name for name in LAUNCHER_VARIABLES if name not in missing]
        raise RuntimeError(
            f"{', '.join(present)} set but {', '.join(missing)} missing in the environment: start the job with "
            "torchrun, which sets all four, or unset them to train in one process"
        )


def world_communicator() -> Communicator:
    """The communicator of all ranks of the default process group."""
    group = dist.group.WORLD
    if group is None:
        raise RuntimeError("no process group: call init_distributed() first")
    return SingleProcess() if dist.get_world_size(group) == 1 else TorchCommunicator(group)
