"""A program under torchrun that saves after every second step, and in which ranks are killed or told to end.

python -m torch.distributed.run ... elastic_run.py FOLDER STEPS [TRANSPORT] [RANK:STEP:SIGNAL ...] [--pace SECONDS]

Each rank appends a line of JSON per step to FOLDER/steps-RANK.jsonl. Each of the signals is sent once, by the rank to
itself within the step, also if the ranks are started again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from resumed import BATCH, config_for, digest_of, engine_for, whole_state

INTERVAL = 2


def config_of(folder: Path, transport: str) -> dict[str, Any]:
    """Global batch and micro-batch are given: the accumulation follows from the number of ranks."""
    keeps = {"dir": str(folder / "saved"), "interval_steps": INTERVAL, "keep_last": 2}
    config = config_for(1, 2, "fp32", checkpoint=keeps, comm={"transport": transport})
    return config | {"train_micro_batch_size_per_gpu": BATCH // 6}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("signals", nargs="*")
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--pace", type=float, default=0.0)
    args = parser.parse_args()
    engine = engine_for(config_of(args.folder, args.transport), seed=1 + int(os.environ["TORCHELASTIC_RESTART_COUNT"]))
    rank = engine.global_rank
    due = [one.split(":") for one in args.signals]

    def send(*_: Any) -> None:
        for who, step, number in due:
            mark = args.folder / f"sent-{who}-{step}"
            if (rank, engine.global_steps + 1) == (int(who), int(step)) and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.Signals[number])

    engine.module.register_forward_pre_hook(send)
    with (args.folder / f"steps-{rank}.jsonl").open("a", buffering=1) as lines:
        lines.write(json.dumps({"begins": engine.global_steps, "ranks": engine.world_size}) + "\n")
        while engine.global_steps < args.steps:
            engine.module.seen.clear()
            loss = engine.train_batch().item()
            seen = {"step": engine.global_steps, "loss": loss, "samples": list(engine.module.seen)}
            lines.write(json.dumps(seen) + "\n")
            time.sleep(args.pace)
        lines.write(json.dumps({"ends": digest_of(whole_state(engine, "AdamW"))}) + "\n")
    engine.destroy()


if __name__ == "__main__":
    main()
