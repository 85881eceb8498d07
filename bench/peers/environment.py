"""The process: its environment variables, its ranks, and the memory it holds.

Import it before torch: OpenMP reads its thread count once, and the baseline of the memory figures is taken here, right
after torch is loaded and before anything else is.
"""

from __future__ import annotations

import os
import socket
import sys
import warnings
from pathlib import Path
from typing import NoReturn

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # of torch.profiler
# DeepSpeed compiles its kernels on first use and looks for ninja, which may be installed beside this interpreter only.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"

import torch
import torch.distributed as dist


def memory_mib(field: str) -> float:
    """A memory figure of this process: VmRSS (resident), VmHWM (its peak), RssShmem (the part in shared memory)."""
    # getrusage would not do: its peak survives exec, so a child starts with that of its parent.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(f"{field} is not in /proc/self/status")


def peers_mib() -> float:
    """The part of this process's shared pages that other processes account for: a page of two counts half in each."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Shmem:"):
            return memory_mib("RssShmem") - int(line.split()[1]) / 1024
    raise KeyError("Pss_Shmem is not in /proc/self/smaps_rollup")


TORCH_RESIDENT_MIB = memory_mib("VmRSS")


class Ranks:
    """The processes of this run: those torchrun started, or this one alone."""

    def __init__(self) -> None:
        _quiet()
        if "RANK" not in os.environ:
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
            os.environ["MASTER_PORT"] = str(_free_port())
        dist.init_process_group("gloo")
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def barrier(self) -> None:
        dist.barrier()

    def largest(self, value: float) -> float:
        """The largest of one number per rank: the time of the slowest, the memory of the fullest."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def mean(self, value: float) -> float:
        return self._reduced(value, dist.ReduceOp.SUM) / self.world_size

    def finish(self) -> NoReturn:
        """Ends the process, when all ranks have come here. Everything has been measured and written.

        Peers keep process groups alive (DDP's reducer does, and modules of DeepSpeed). A thread of gloo that lets go of
        the tensors of the last collective while Python ends aborts the process: nothing could be told from its exit
        status. So Python does not get to its end.
        """
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def _reduced(self, value: float, operation: dist.ReduceOp.RedOpType) -> float:
        cell = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(cell, operation)
        return cell.item()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _quiet() -> None:
    """Keep the peers' warnings about their own internals out of the tables."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
