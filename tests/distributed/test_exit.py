"""A program may end right after its last collective. Run as a script, this file is that program."""

from __future__ import annotations

import subprocess
import sys

JOBS, RANKS, COLLECTIVES = 6, 2, 50


def test_a_program_may_end_right_after_a_collective_over_gloo(tmp_path):
    """Without what `TorchCommunicator` does about it, some 40 % of these jobs abort in a thread of gloo."""
    ended = []
    for job in range(JOBS):
        command = [sys.executable, __file__, str(tmp_path / str(job))]
        processes = [subprocess.Popen([*command, str(r)], stderr=subprocess.PIPE, text=True) for r in range(RANKS)]
        errors = [process.communicate(timeout=60)[1] for process in processes]
        ended += [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]
    assert [code for code, _ in ended] == [0] * JOBS * RANKS, next(error for code, error in ended if code)


if __name__ == "__main__":
    import torch
    import torch.distributed as dist
    from partita.comm import world_communicator

    store, rank = sys.argv[1], int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    communicator = world_communicator("torch")
    for _ in range(COLLECTIVES):
        communicator.all_reduce(torch.zeros(1000)).wait()
