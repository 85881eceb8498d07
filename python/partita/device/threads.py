"""How many threads the host may use for its part of a step, where the model is on a GPU."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Cores:
    """The cores that a process may run on.

    Attributes:
        host: equal on two processes of one machine.
        cores: their numbers there, by the process's affinity.
        group: equal on two processes that share `quota`.
        quota: cores that the group may use at a time; None: all.
    """

    host: str
    cores: tuple[int, ...]
    group: str = ""
    quota: float | None = None

    def text(self) -> str:
        """For other processes."""
        return json.dumps(asdict(self))

    @staticmethod
    def of_text(text: str) -> Cores:
        """The reverse of `text`."""
        fields = json.loads(text)
        return Cores(**{**fields, "cores": tuple(fields["cores"])})


def own_cores() -> Cores:
    """Those of this process."""
    host = platform.node()
    with suppress(OSError):
        host = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    count = os.cpu_count() or 1
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(count))
    group, quota = _quota()
    return Cores(host, tuple(cores), group, quota)


def threads_for(own: Cores, by_rank: Sequence[Cores]) -> int:
    """The cores that belong to a rank, at least 1: of those that several ranks may run on, each has its share.

    Launchers give the ranks of a host all cores together, or some cores to each rank: so it is the ranks' affinities
    that count, and not how many ranks there are.

    Args:
        by_rank: of all ranks, this one among them.
    """
    beside = [other.cores for other in by_rank if other.host == own.host]
    share = sum(1 / max(1, sum(core in cores for cores in beside)) for core in own.cores)
    if own.quota is not None:
        sharing = sum((other.host, other.group) == (own.host, own.group) for other in by_rank)
        share = min(share, own.quota / max(1, sharing))
    return max(1, int(share + 1e-6))


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """In this block torch computes with so many threads on the host. None: as many as before."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if threads is not None:
            torch.set_num_threads(before)


def _quota() -> tuple[str, float | None]:
    """The control group whose processes share a limit, and the limit in cores (version 2 of control groups)."""
    try:
        line = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        namespace = os.stat("/proc/self/ns/cgroup").st_ino
    except (OSError, StopIteration):
        return "", None
    path = Path(line.removeprefix("0::/"))
    limits = []
    for folder in [path, *path.parents]:
        with suppress(OSError, ValueError):  # no limit: "max"
            quota, period = (_CGROUPS / folder / "cpu.max").read_text().split()
            limits.append(int(quota) / int(period))
    return f"{namespace} {path}", min(limits, default=None)
