"""Training GPT-2 on one GPU: tokens/s and peak memory of Partita, plain torch and DeepSpeed.

    python bench/gpu/gpt2.py [--models 124m,1.5b] [--contenders partita1,torch-autocast] [--compile] [--json FILE]

Random tokens, sequences of 1024, AdamW, clipping at 1. Plain torch trains fp32 weights under bf16 autocast with fused
AdamW; Partita and DeepSpeed hold bf16 weights and fp32 masters (`-split`: the 16 bits that bf16 lacks). Every contender
has a process of its own, in turns; all have the same micro-batch unless one runs out of memory and halves its own. The
floating-point operations are 6 per parameter and token and those of causal attention, against 989 TFLOP/s.
"""

from __future__ import annotations

import prelude  # isort: skip  # noqa: F401  (the helpers of the peers can be imported after it)
import argparse
import math
from collections.abc import Callable
from statistics import median

import cases
import torch
from contenders import build
from device import elapsed_ms, peak_bytes, release, reset_peak
from engines import Engine
from formulas import H100_BF16_FLOPS, Sizes, training_flops_per_token
from language.models import GPT, ModelConfig
from torch import Tensor, nn
from workload import Task, count

CONTENDERS = ["partita0", "torch-autocast", "partita0-split", "deepspeed1"]
COMPILED = ["partita0", "torch-autocast", "partita0-split"]
# The vocabulary of 50,257 is padded to a multiple of 128, for everyone.
MODELS = {
    "124m": Sizes(layers=12, heads=12, width=768, vocabulary=50304, context=1024),
    "1.5b": Sizes(layers=48, heads=25, width=1600, vocabulary=50304, context=1024),
    "tiny": Sizes(layers=2, heads=2, width=64, vocabulary=512, context=1024),
}
MICRO_BATCH = {"124m": 32, "1.5b": 8, "tiny": 2}


def model_on(device: torch.device, sizes: Sizes, compiled: bool) -> Callable[[], nn.Module]:
    config = ModelConfig(sizes.vocabulary, sizes.context, sizes.layers, sizes.heads, sizes.width)

    def made() -> nn.Module:
        torch.manual_seed(0)
        with torch.device(device):
            model = GPT(config)
        if compiled:
            for block in model.blocks:  # one graph for all of them
                block.compile()
        return model

    return made


def batches(device: torch.device, sizes: Sizes, micro_batch: int, length: int, number: int = 4) -> list[list[Tensor]]:
    """Tokens and targets [micro_batch, length], drawn once."""
    generator = torch.Generator(device).manual_seed(1)
    drawn = [
        torch.randint(sizes.vocabulary, (micro_batch, length + 1), generator=generator, device=device)
        for _ in range(number)
    ]
    return [[tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()] for tokens in drawn]


def steps_of(engine: Engine, data: list[list[Tensor]]) -> Callable[[], Tensor]:
    """A function that does one step, on the next batch each time."""
    position = 0

    def step() -> Tensor:
        nonlocal position
        position += 1
        return engine.step(*data[position % len(data)])

    return step


def trained(case: str, micro_batch: int, arguments: argparse.Namespace) -> cases.Answer:
    """Raises torch.OutOfMemoryError when the micro-batch does not fit."""
    model, contender, *compiled = case.split()
    device, sizes = arguments.device, MODELS[model]
    engine = build(contender, Task(model_on(device, sizes, bool(compiled)), sizes.parameters, "bf16", 1.0), device)
    step = steps_of(engine, batches(device, sizes, micro_batch, arguments.length))
    first = step().item()
    release(device)  # of what building it took
    for _ in range(arguments.warm_up):
        step()
    reset_peak(device)
    ms = [elapsed_ms(device, step, arguments.steps) for _ in range(arguments.turns)]
    memory = peak_bytes(device)
    last = step().item()
    if not math.isfinite(last):
        raise RuntimeError(f"the loss went from {first} to {last}")
    speed = micro_batch * arguments.length / median(ms) * 1e3
    flops = training_flops_per_token(sizes, arguments.length)
    return {
        "parameters": sizes.parameters,
        "micro_batch": micro_batch,
        "ms": ms,
        "tokens_per_s": speed,
        "mfu": speed * flops / H100_BF16_FLOPS,
        "peak_bytes": memory,
        "losses": [first, last],
    }


def measure(case: str, arguments: argparse.Namespace) -> cases.Answer:
    model = case.split()[0]
    sizes = MODELS[model]
    expected = count(_meta_model(sizes))
    if expected != sizes.parameters:
        raise AssertionError(f"{sizes} is said to have {sizes.parameters} parameters and has {expected}")
    micro_batch = arguments.micro_batch or MICRO_BATCH[model]
    while True:
        try:
            return trained(case, micro_batch, arguments)
        except torch.OutOfMemoryError:
            if micro_batch == 1:
                raise
        micro_batch //= 2
        release(arguments.device)


def _meta_model(sizes: Sizes) -> nn.Module:
    with torch.device("meta"):
        return GPT(ModelConfig(sizes.vocabulary, sizes.context, sizes.layers, sizes.heads, sizes.width))


def main() -> None:
    parser = cases.new_parser(__doc__)
    parser.add_argument("--models", type=cases.names, default=["124m", "1.5b"])
    parser.add_argument("--contenders", type=cases.names)
    parser.add_argument("--compile", action="store_true", help="under torch.compile")
    parser.add_argument("--micro-batch", type=int, default=0, help="sequences; 0: what the model's size suggests")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=5, help="steps in a row at each turn")
    parser.add_argument("--turns", type=int, default=3, help="in each process")
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2, help="processes per contender, in turns")
    arguments = parser.parse_args()
    contenders = arguments.contenders or (COMPILED if arguments.compile else CONTENDERS)
    suffix = " compiled" if arguments.compile else ""

    def drive(runner: cases.Runner) -> None:
        for model in arguments.models:
            runner.take_turns([f"{model} {contender}{suffix}" for contender in contenders], arguments.rounds)

    cases.run(arguments, lambda case: measure(case, arguments), drive)


if __name__ == "__main__":
    main()
