"""The largest GPT that does a whole training step in the GPU's memory, against the 16- and 14-byte formulas.

    python bench/gpu/largest.py [--masters fp32,split] [--json FILE]

Batch 1, a short sequence, bf16: memory is model states but for some MiB. The formula divides the memory that is free
in a process that has the CUDA context and has computed something. Each try is a process of its own; the search goes
over the number of blocks and ends when it knows the answer to within half a percent.
"""

from __future__ import annotations

import prelude  # isort: skip  # noqa: F401  (the helpers of the peers can be imported after it)
import argparse
import os
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import cases
import torch
from contenders import build
from device import peak_bytes
from formulas import STATE_BYTES, Sizes, largest_that_fits
from language.models import GPT, ModelConfig
from torch import nn
from workload import Task

CONTENDERS = {"fp32": "partita0", "split": "partita0-split"}
LENGTH = 16
GUESS = 0.97  # of the formula: what the first try takes
TOLERANCE = 0.005
OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError", "out of memory", "t allocate memory")


def sizes_of(width: int, layers: int) -> Sizes:
    return Sizes(layers, heads=width // 64, width=width, vocabulary=1024, context=LENGTH)


def model_on(device: torch.device, sizes: Sizes) -> nn.Module:
    """With bf16 weights from the start: fp32 ones would take the place that the states are to have."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return GPT(ModelConfig(sizes.vocabulary, sizes.context, sizes.layers, sizes.heads, sizes.width))
    finally:
        torch.set_default_dtype(before)


def tokens_on(device: torch.device) -> torch.Tensor:
    return torch.randint(1024, (1, LENGTH), device=device)


def free_bytes(arguments: argparse.Namespace) -> dict[str, int]:
    """What is free once the context and the matrix library are loaded, and what the device has in all."""
    device: torch.device = arguments.device
    if device.type != "cuda":
        return {"free": arguments.memory_mib * 2**20, "total": arguments.memory_mib * 2**20}
    square = torch.ones(256, 256, device=device, dtype=torch.bfloat16)
    (square @ square).sum().item()
    del square
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return {"free": free, "total": total}


def limit_host_memory(mebibytes: int) -> None:
    """On the CPU: lets this process have so much more than it has now."""
    now_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now_bytes + mebibytes * 2**20,) * 2)


def measure(case: str, arguments: argparse.Namespace) -> cases.Answer:
    what, *rest = case.split()
    if what == "memory":
        return dict(free_bytes(arguments))
    device, sizes = arguments.device, sizes_of(arguments.width, int(rest[0]))
    if device.type != "cuda":
        limit_host_memory(arguments.memory_mib)
    engine = build(CONTENDERS[what], Task(lambda: model_on(device, sizes), sizes.parameters, "bf16", 1.0), device)
    tokens = tokens_on(device)
    losses = [engine.step(tokens, tokens).item() for _ in range(arguments.steps)]
    return {"parameters": sizes.parameters, "losses": losses, "peak_bytes": peak_bytes(device)}


def ran_out_of_memory(answer: cases.Answer) -> bool:
    return any(sign in str(answer.get("error", "")) for sign in OUT_OF_MEMORY)


def search(runner: cases.Runner, masters: str, memory: dict[str, Any]) -> dict[str, Any]:
    """Tries models until the largest is known; when a try fails for want of something else, the largest so far."""
    arguments = runner.arguments
    one = sizes_of(arguments.width, 1)
    formula = memory["free"] // STATE_BYTES[masters]
    limit = (formula - one.outside_blocks) // one.per_block
    largest, result = 0, {"bytes_per_parameter": STATE_BYTES[masters], "formula_parameters": formula}

    def fits(layers: int) -> bool:
        nonlocal largest
        answer = runner.run(f"{masters} {layers}")
        if "error" not in answer:
            largest = max(largest, layers)
        elif not ran_out_of_memory(answer):
            raise RuntimeError(str(answer["error"]))
        return "error" not in answer

    try:
        tolerance = max(1, int(limit * TOLERANCE))
        largest_that_fits(fits, limit, max(1, int(limit * GUESS)), tolerance, arguments.tries)
    except RuntimeError as error:
        result["error"] = str(error)
    parameters = replace(one, layers=largest).parameters if largest else 0
    whole = memory["total"] // STATE_BYTES[masters]
    return result | {
        "parameters": parameters,
        "of_formula": parameters / formula,
        "of_whole_device": parameters / whole,
    }


def drive(runner: cases.Runner) -> None:
    memory = runner.run("memory")
    if "error" in memory:
        return
    for masters in runner.arguments.masters:
        runner.extra[masters] = search(runner, masters, memory)
        runner.write()


def main() -> None:
    # Without it the last percents are lost to gaps between blocks of different sizes.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    parser = cases.new_parser(__doc__)
    parser.add_argument("--masters", type=cases.names, default=["fp32", "split"])
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--tries", type=int, default=8, help="processes per kind of masters")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--memory-mib", type=int, default=400, help="on the CPU: the memory of the pretended device")
    arguments = parser.parse_args()
    cases.run(arguments, lambda case: measure(case, arguments), drive)


if __name__ == "__main__":
    main()
