"""What encryption costs: save and load of one checkpoint, plain and encrypted in turns. python encrypted.py [MB]"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import partita
import torch
from partita.checkpoint import new_key
from torch import nn

ROUNDS = 5


class Layers(nn.Module):
    def __init__(self, megabytes: int) -> None:
        super().__init__()
        # fp32 weights and two moments: 12 bytes for each parameter.
        count = max(1, megabytes * 1_000_000 // (12 * 1024 * 1024))
        self.layers = nn.ModuleList([nn.Linear(1024, 1024, bias=False) for _ in range(count)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


def engine_for(megabytes: int, encrypted: bool) -> partita.Engine:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-4}},
        "checkpoint": {"encryption": {"key_env": "BENCH_KEY"} if encrypted else None},
    }
    engine = partita.Engine(Layers(megabytes), config=config)
    engine.backward(engine(torch.randn(1, 1024)))
    engine.step()
    return engine


def main() -> None:
    """Prints seconds and the ratio of the medians."""
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 600
    os.environ["BENCH_KEY"] = new_key()
    engines = {kind: engine_for(megabytes, kind == "encrypted") for kind in ("plain", "encrypted")}
    times: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as root:
        for _ in range(ROUNDS):
            for kind, engine in engines.items():
                folder = Path(root, kind)
                for call in (engine.save_checkpoint, engine.load_checkpoint):
                    begin = time.perf_counter()
                    call(folder, "tag")
                    times.setdefault((call.__name__, kind), []).append(time.perf_counter() - begin)
        size = sum(path.stat().st_size for path in Path(root, "plain", "tag").iterdir())
    for call in ("save_checkpoint", "load_checkpoint"):
        plain, encrypted = (statistics.median(times[call, kind]) for kind in ("plain", "encrypted"))
        speeds = f"plain {size / plain / 1e9:.2f} GB/s, encrypted {size / encrypted / 1e9:.2f} GB/s"
        print(f"{call}, {size / 1e6:.0f} MB: {speeds}: {encrypted / plain:.2f} times the time")


if __name__ == "__main__":
    main()
