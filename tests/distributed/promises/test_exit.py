"""How programs over gloo end. Run as a script, this file is one of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

from warm_python import WarmPython

JOBS, COLLECTIVES = 6, 50
TIMEOUT_S = 60  # of gloo


def test_a_program_may_end_right_after_a_collective(tmp_path, python):
    """Without what `TorchCommunicator` does about it, some 40 % of these jobs abort in a thread of gloo."""
    ended = [end for job in range(JOBS) for end in _run(python, "collectives", tmp_path / str(job), ranks=2)]
    assert [code for code, _ in ended] == [0] * JOBS * 2, next(error for code, error in ended if code)


def test_a_program_ends_at_once_while_another_collective_is_under_way(tmp_path, python):
    """Rank 1 dies. Rank 0 notices, while it waits for rank 2 in another group; rank 2 waits for rank 0."""
    begun = time.monotonic()
    survivor, _, other = _run(python, "failure", tmp_path / "store", ranks=3)
    assert time.monotonic() - begun < TIMEOUT_S / 2
    for code, error in (survivor, other):
        assert code == 1
        assert re.search(r"CommunicationError: (rank 0 gave up: )?receive of 10 float32, on rank ", error)


def _run(python: WarmPython, program: str, store: Path, ranks: int) -> list[tuple[int, str]]:
    """The exit code of each rank, and what it printed to stderr."""
    command = [*python.command, __file__, program, str(store), str(ranks)]
    processes = [subprocess.Popen([*command, str(r)], stderr=subprocess.PIPE, text=True) for r in range(ranks)]
    try:
        errors = [process.communicate(timeout=2 * TIMEOUT_S)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


if __name__ == "__main__":
    import torch
    import torch.distributed as dist
    from partita.comm import world_communicator

    program, store, ranks, rank = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    timeout = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timeout)
    communicator = world_communicator("torch")
    if program == "collectives":
        for _ in range(COLLECTIVES):
            communicator.all_reduce(torch.zeros(1000)).wait()
    else:
        other = world_communicator("torch", beside=communicator)
        other.barrier()
        communicator.barrier()
        if rank == 0:
            under_way = other.broadcast(torch.zeros(10), 2)
            communicator.recv(torch.zeros(10), 1).wait()
        elif rank == 1:
            time.sleep(0.5)
            os._exit(0)
        else:
            communicator.recv(torch.zeros(10), 0).wait()
