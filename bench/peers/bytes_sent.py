"""Bytes that a step of stage 3 sends over the network, against its floor of 3 (N-1)/N times the parameters.

    torchrun --nproc-per-node 2 bench/peers/bytes_sent.py [--engines partita3-gloo,partita3,fsdp2,deepspeed3]

All ranks are on this host, so what they send passes through its loopback device, whose counter is read before and after
some steps; nothing else may use it. What ranks read of each other's memory is not counted there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from environment import Ranks  # isort: skip  (it sets up the process for torch)
from engines import ENGINES
from measure import engine_names
from report import print_table, settings_of, write_json
from workload import Task, count, gpt, gpt_batch

ELEMENT_BYTES = {"fp32": 4, "bf16": 2}


def loopback_bytes() -> int:
    """Bytes that this host has sent to itself."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        device, _, counters = line.partition(":")
        if device.strip() == "lo":
            return int(counters.split()[8])
    raise KeyError("there is no loopback device in /proc/net/dev")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["partita3-gloo", "partita3", "fsdp2", "deepspeed3"]
    parser.add_argument("--engines", type=engine_names, default=default)
    parser.add_argument("--dtype", choices=tuple(ELEMENT_BYTES), default="fp32")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    ranks = Ranks()
    task = Task(gpt, count(gpt()), arguments.dtype)
    batch = gpt_batch(ranks.rank, 1, 32)
    floor = 3 * (ranks.world_size - 1) / ranks.world_size * task.numel * ELEMENT_BYTES[arguments.dtype]
    sent: dict[str, float] = {}
    for name in arguments.engines:
        engine = ENGINES[name].build(task)
        for _ in range(2):
            engine.step(*batch)
        ranks.barrier()
        before = loopback_bytes()
        for _ in range(arguments.steps):
            engine.step(*batch)
        ranks.barrier()
        sent[name] = (loopback_bytes() - before) / arguments.steps / ranks.world_size
        engine.close()
    if ranks.rank == 0:
        print(f"{task.numel:,} parameters, {ranks.world_size} ranks, {arguments.dtype}; floor {floor / 1e6:.1f} MB")
        rows = [[name, f"{nbytes / 1e6:.1f}", f"{nbytes / floor:.3f}"] for name, nbytes in sent.items()]
        print_table(["engine", "MB per rank and step", "x floor"], rows)
        write_json(arguments.json, {"arguments": settings_of(arguments), "floor_bytes": floor, "sent_bytes": sent})
    ranks.finish()


if __name__ == "__main__":
    main()
