"""Offload to the host: what it costs per step against resident states, and that it trains what does not fit without.

    python bench/gpu/offload.py [--layers N] [--budget-of-states 0.5] [--json FILE]

`resident`, `optimizer`, `half` (ratio 0.5) and `parameters` (stage 3, with offload_param) take turns with the same
model on a device with room for all. Then its memory is cut to a part of the model states: `resident` must run out of
memory there, `parameters` must train. On the CPU, where host and device are one, only the first half is measured.
"""

from __future__ import annotations

import prelude  # isort: skip  # noqa: F401  (the helpers of the peers can be imported after it)
import argparse
from statistics import median
from typing import Any

import cases
import torch
from contenders import partita_config, partita_engine
from device import elapsed_ms, peak_bytes, release, reset_peak
from formulas import STATE_BYTES, Sizes
from largest import LENGTH, model_on, ran_out_of_memory, sizes_of, tokens_on
from workload import Task

HOST = {"device": "cpu"}
KINDS: dict[str, dict[str, Any]] = {
    "resident": {"stage": 2},
    "optimizer": {"stage": 2, "offload_optimizer": HOST},
    "half": {"stage": 2, "offload_optimizer": HOST | {"ratio": 0.5}},
    "parameters": {"stage": 3, "offload_optimizer": HOST, "offload_param": HOST},
}


def states_bytes(sizes: Sizes) -> int:
    return STATE_BYTES["fp32"] * sizes.parameters


def measure(case: str, arguments: argparse.Namespace) -> cases.Answer:
    kind, *cut = case.split()
    device, sizes = arguments.device, sizes_of(arguments.width, arguments.layers)
    if cut and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(arguments.budget_of_states * states_bytes(sizes) / total, device)
    task = Task(lambda: model_on(device, sizes), sizes.parameters, "bf16", 1.0)
    config = partita_config(task, 2)
    config["zero_optimization"] = KINDS[kind]
    engine = partita_engine(task, config)
    tokens = tokens_on(device)
    losses = [engine.step(tokens, tokens).item() for _ in range(2)]
    release(device)
    reset_peak(device)
    ms = elapsed_ms(device, lambda: engine.step(tokens, tokens), arguments.steps)
    return {"parameters": sizes.parameters, "losses": losses, "ms": ms, "peak_bytes": peak_bytes(device)}


def drive(runner: cases.Runner) -> None:
    arguments = runner.arguments
    runner.take_turns(list(KINDS), arguments.rounds)
    times = {kind: [a["ms"] for a in runner.answers[kind] if "ms" in a] for kind in KINDS}
    runner.extra["of_resident"] = {
        kind: median(ms) / median(times["resident"]) for kind, ms in times.items() if ms and times["resident"]
    }
    if arguments.device.type == "cuda":
        does_not_fit = ran_out_of_memory(runner.run("resident within-budget"))
        trains = "losses" in runner.run("parameters within-budget")
        runner.extra["beyond_the_device"] = {"resident_does_not_fit": does_not_fit, "offloaded_trains": trains}
    runner.write()


def main() -> None:
    parser = cases.new_parser(__doc__)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=24, help=f"of a GPT on {LENGTH} tokens")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--budget-of-states", type=float, default=0.5, help="memory of the cut device, over 16 bytes")
    arguments = parser.parse_args()
    cases.run(arguments, lambda case: measure(case, arguments), drive)


if __name__ == "__main__":
    main()
