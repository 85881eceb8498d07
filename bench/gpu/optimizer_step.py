"""The whole optimizer step at one rank: norm, overflow check, unscaling, clipping at 1, Adam, cast.

    python bench/gpu/optimizer_step.py [--dtypes bf16,fp16] [--contenders partita0,torch-masters] [--json FILE]

The model is 100 large tensors and 1,000 small ones. The gradients come from an untimed forward and backward of a sum;
the device is idle before each step. Times are also given as bytes per parameter: what a copy, measured in the same
process, moves (reads and writes) in the time of the step; the floor is 30.
"""

from __future__ import annotations

import prelude  # isort: skip  # noqa: F401  (the helpers of the peers can be imported after it)
import argparse
from collections.abc import Callable
from statistics import median

import cases
import torch
from contenders import build
from device import copy_gb_per_s, elapsed_ms, host_ms, peak_bytes, release, reset_peak, synchronize
from formulas import STEP_FLOOR_BYTES
from torch import Tensor, nn
from workload import Task, Vectors

CONTENDERS = ["partita0", "torch-masters", "partita1", "deepspeed1", "partita0-split"]
LARGE, SMALL = 100, 1000
SMALL_NUMEL = 1000
CLIP = 1.0


class LargeAndSmall(nn.Module):
    """Parameters alone, whose gradients are one constant."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.large = Vectors(LARGE, max(1, (numel - SMALL * SMALL_NUMEL) // LARGE))
        self.small = Vectors(SMALL, SMALL_NUMEL)

    def forward(self) -> Tensor:
        loss: Tensor = self.large() + self.small()
        return loss


def model_on(device: torch.device, numel: int) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        torch.manual_seed(0)
        with torch.device(device):
            return LargeAndSmall(numel)

    return made


def measure(case: str, arguments: argparse.Namespace) -> cases.Answer:
    dtype, contender = case.split()
    device: torch.device = arguments.device
    copies = [copy_gb_per_s(device, arguments.copy_mib * 2**20)]
    release(device)
    reset_peak(device)
    engine = build(contender, Task(model_on(device, arguments.numel), arguments.numel, dtype, CLIP), device)
    losses = [engine.step().item() for _ in range(arguments.warm_up)]
    ms, until_return_ms = [], []
    for _ in range(arguments.steps):
        engine.forward_backward()
        ms.append(elapsed_ms(device, engine.update))
    for _ in range(arguments.steps):
        losses.append(engine.forward_backward().item())
        until_return_ms.append(host_ms(device, engine.update))
    synchronize(device)
    memory = peak_bytes(device)
    engine.close()
    del engine
    release(device)
    copies.append(copy_gb_per_s(device, arguments.copy_mib * 2**20))
    moved = median(ms) * median(copies) * 1e6 / arguments.numel
    return {
        "ms": ms,
        "host_ms": until_return_ms,
        "copy_gb_per_s": copies,
        "bytes_per_parameter": moved,
        "x_floor": moved / STEP_FLOOR_BYTES,
        "peak_bytes": memory,
        "losses": [losses[0], losses[-1]],
    }


def main() -> None:
    parser = cases.new_parser(__doc__)
    parser.add_argument("--numel", type=int, default=1_000_000_000)
    parser.add_argument("--dtypes", type=cases.names, default=["bf16", "fp16"])
    parser.add_argument("--contenders", type=cases.names, default=CONTENDERS)
    parser.add_argument("--rounds", type=int, default=2, help="processes per contender, in turns")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--copy-mib", type=int, default=4096)
    arguments = parser.parse_args()
    wanted = [f"{dtype} {contender}" for dtype in arguments.dtypes for contender in arguments.contenders]
    wanted = [case for case in wanted if case != "fp16 partita0-split"]  # only bf16 has split masters
    cases.run(
        arguments,
        lambda case: measure(case, arguments),
        lambda runner: runner.take_turns(wanted, arguments.rounds),
    )


if __name__ == "__main__":
    main()
