"""What the host does in a step: synchronisations with the GPU (there should be none) and time until step() returns.

    python bench/gpu/host.py [--what sync,calls,time] [--json FILE]

sync: 20 full steps (forward, backward, clipping, a schedule, two micro-batches) under torch's sync debug mode "warn",
counted, and 20 under "error". calls: blocking CUDA calls that the profiler sees in 10 such steps; it also sees those
that torch's debug mode does not. time: until `step()` returns with 1,000 parameters, the GPU idle before it and not
waited for; torch's optimizers beside it do less unless their name says "and clip".
"""

from __future__ import annotations

import prelude  # isort: skip  # noqa: F401  (the helpers of the peers can be imported after it)
import argparse
import json
import math
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import cases
import torch
from contenders import build, partita_config
from device import host_ms, synchronize
from language.models import GPT, ModelConfig
from torch import Tensor, nn
from workload import Task, Vectors

SYNC_CASES = ["fp16 0", "fp16 1", "bf16 0", "bf16 1", "bf16-split 1"]
TIME_CASES = ["fp32 partita0", "bf16 partita0", "fp16 partita0", "bf16 partita1", "bf16 partita0-split"]
TIME_CASES += ["fp32 torch-fused", "fp32 torch-foreach", "fp32 torch-fused and clip", "fp16 torch-masters and clip"]
BLOCKING_CALLS = (
    *("cudaStreamSynchronize", "cudaDeviceSynchronize", "cuStreamSynchronize", "cuCtxSynchronize"),
    *("cudaMemcpy", "cudaMalloc", "cudaFree"),
)
# For the outcome of the step before, when a GPU with more to do than the host has not got there; it never idles for it.
# The engine asks by cudaEventQuery, and so does torch's allocator: those are counted by themselves.
WAITS_FOR_LAST_STEP = ("cudaEventSynchronize", "cuEventSynchronize")
ACCUMULATION = 2
OVERFLOWING_SCALE_POWER = 24  # halved in skipped steps: the watched steps are to see some of these, too
SYNC_WARNING = "called a synchronizing"
RANGE = "the steps"


def training(dtype: str, stage: int, device: torch.device) -> tuple[Any, Callable[[], Tensor]]:
    """An engine with a small transformer, and a function that does one whole step and gives its last loss."""
    import partita

    torch.manual_seed(0)
    with torch.device(device):
        model = GPT(ModelConfig(vocabulary=512, context=64, layers=4, heads=4, width=128))
    name, _, masters = dtype.partition("-")
    task = Task(lambda: model, 0, name, clip=1.0)
    config = partita_config(task, stage, split=masters == "split", accumulation=ACCUMULATION)
    schedule = {"warmup_min_lr": 0.0, "warmup_max_lr": 1e-3, "warmup_num_steps": 10, "total_num_steps": 1000}
    config["scheduler"] = {"type": "WarmupDecayLR", "params": schedule}
    if name == "fp16":
        config["fp16"]["initial_scale_power"] = OVERFLOWING_SCALE_POWER
    engine, *_ = partita.initialize(model=model, config=config)
    tokens = torch.randint(512, (8, 65), device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> Tensor:
        loss = torch.empty(0)
        for _ in range(ACCUMULATION):
            loss = engine(inputs, targets)
            engine.backward(loss)
            engine.step()
        return loss.detach()

    return engine, step


def measure_sync(dtype: str, stage: int, arguments: argparse.Namespace) -> cases.Answer:
    device: torch.device = arguments.device
    engine, step = training(dtype, stage, device)
    first = step().item()
    for _ in range(arguments.warm_up):
        step()
    synchronize(device)
    skipped = engine.skipped_steps
    answer: cases.Answer = {"steps": arguments.steps, "watched": device.type == "cuda"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _watched(step, "warn", arguments.steps, device)
    found = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if SYNC_WARNING in str(w.message)]
    answer |= {"synchronisations": len(found), "where": sorted(set(found))}
    cases.give(arguments, answer | {"error": "it ended under the debug mode"})
    try:
        _watched(step, "error", arguments.steps, device)
        answer["raised"] = None
    except RuntimeError as error:
        answer["raised"] = str(error)[:300]
    loss = step().item() if answer["raised"] is None else math.nan
    return answer | {"losses": [first, loss], "skipped_steps": engine.skipped_steps - skipped}


def _watched(step: Callable[[], Tensor], mode: str, times: int, device: torch.device) -> None:
    if device.type != "cuda":
        for _ in range(times):
            step()
        return
    torch.cuda.set_sync_debug_mode(mode)
    try:
        for _ in range(times):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def measure_calls(dtype: str, stage: int, arguments: argparse.Namespace) -> cases.Answer:
    device: torch.device = arguments.device
    _, step = training(dtype, stage, device)
    for _ in range(arguments.warm_up):
        step()
    synchronize(device)
    with torch.profiler.profile() as profile:
        step()  # what the profiler sets up at the first launch stays outside the range
        with torch.profiler.record_function(RANGE):
            for _ in range(arguments.profiled):
                step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return {"steps": arguments.profiled} | calls_in_range(json.loads(path.read_text())["traceEvents"])


def calls_in_range(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Blocking calls, and all calls of the CUDA runtime and driver, that began inside the range of the steps."""
    ranges = [event for event in events if event.get("name") == RANGE and event.get("cat") == "user_annotation"]
    if not ranges:
        raise RuntimeError("the trace has no range of the steps")
    begin, end = ranges[0]["ts"], ranges[0]["ts"] + ranges[0]["dur"]
    calls = [event["name"] for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")
             and begin <= event["ts"] <= end]  # fmt: skip
    return {
        "calls": len(calls),
        "blocking": {name: calls.count(name) for name in BLOCKING_CALLS if name in calls},
        "waits_for_last_step": sum(calls.count(name) for name in WAITS_FOR_LAST_STEP),
        "event_queries": calls.count("cudaEventQuery"),
    }


def measure_time(dtype: str, contender: str, arguments: argparse.Namespace) -> cases.Answer:
    device: torch.device = arguments.device

    def model() -> nn.Module:
        torch.manual_seed(0)
        with torch.device(device):
            return Vectors(arguments.parameters, 1000)

    name, _, clip = contender.partition(" and ")
    clips = bool(clip) or name.startswith("partita")
    engine = build(name, Task(model, 0, dtype, clip=1.0 if clips else 0.0), device)
    for _ in range(5):
        engine.step()
    ms = []
    for _ in range(arguments.repeats):
        engine.forward_backward()
        ms.append(host_ms(device, engine.update))
    return {"ms": ms, "median_ms": median(ms), "parameters": arguments.parameters}


def measure(case: str, arguments: argparse.Namespace) -> cases.Answer:
    what, dtype, subject = case.split(" ", 2)
    if what == "time":
        return measure_time(dtype, subject, arguments)
    return (measure_sync if what == "sync" else measure_calls)(dtype, int(subject), arguments)


def main() -> None:
    parser = cases.new_parser(__doc__)
    parser.add_argument("--what", type=cases.names, default=["sync", "time", "calls"])
    parser.add_argument("--first", type=int, help="so many cases of each kind; default: all")
    parser.add_argument("--steps", type=int, default=20, help="under each debug mode")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before those that are watched")
    parser.add_argument("--profiled", type=int, default=10, help="steps under the profiler")
    parser.add_argument("--repeats", type=int, default=50, help="timed calls of step()")
    parser.add_argument("--parameters", type=int, default=1000)
    arguments = parser.parse_args()
    subjects = {"sync": SYNC_CASES, "time": TIME_CASES, "calls": SYNC_CASES}
    wanted = [f"{what} {subject}" for what in arguments.what for subject in subjects[what][: arguments.first]]
    cases.run(arguments, lambda case: measure(case, arguments), lambda runner: runner.take_turns(wanted, 1))


if __name__ == "__main__":
    main()
