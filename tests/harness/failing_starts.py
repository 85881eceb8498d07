"""Jobs of two ranks whose `initialize()` fails, as programs of their own: none may abort.

python tests/harness/failing_starts.py 100
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections import Counter

PROGRAM = """
import sys
import torch
import partita

rank, kind = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
model = torch.nn.Linear(8, 8)
lr = 1e-3
if kind == "differs" and rank == 1:
    lr = 2e-3
if kind == "refused":  # after the ranks have made their communicators
    model.weight.data = model.weight.data.double()
if kind == "unknown":
    lr = "much"
config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {"lr": lr}},
          "comm": {"transport": sys.argv[3]}}
partita.initialize(model=model, config=config)
"""
EXPECTED = {
    "differs": "optimizer.params.lr is 0.001 on rank 0 and 0.002 on rank 1",
    "refused": "parameter 'weight' is torch.float64",
    "unknown": "optimizer.params",
}
JOB_TIMEOUT_S = 240


def failing_starts(jobs: int, python: list[str]) -> Counter[str]:
    """What became of the ranks: "error" where the expected one was the last thing that a rank said."""
    found: Counter[str] = Counter()
    for job in range(jobs):
        kind = list(EXPECTED)[job % len(EXPECTED)]
        for code, text in _run(python, kind, ("torch", "auto")[job // len(EXPECTED) % 2]):
            last = "\n".join(text.strip().splitlines()[-10:])
            found["error" if code == 1 and EXPECTED[kind] in last else f"{kind}: exit {code}: {last}"] += 1
    return found


def _run(python: list[str], kind: str, transport: str) -> list[tuple[int, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [*python, "-c", PROGRAM, str(rank), kind, transport],
            env={**os.environ, **place, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=JOB_TIMEOUT_S)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


if __name__ == "__main__":
    outcome = failing_starts(int(sys.argv[1]), [sys.executable])
    print(*(f"{count} x {what}" for what, count in outcome.items()), sep="\n")
    sys.exit(set(outcome) != {"error"})
