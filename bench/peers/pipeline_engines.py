"""The pipelines under comparison: torch.distributed.pipelining, DeepSpeed's pipeline engine, Partita's.

All have the layers of a `PipelineTask`, cut at the same places. A step takes all micro-batches of the task, and ends
with an update by AdamW in fp32. torch and DeepSpeed send through gloo, Partita through shared memory, or gloo as well.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from engines import library, silent
from language.pipeline_layers import mean_loss
from pipeline_task import PipelineTask
from torch.distributed.pipelining import PipelineStage, schedules
from torch.optim import AdamW


@dataclass
class Pipeline:
    """A pipeline in training. `step()` gives the mean loss on the ranks that know it, else NaN."""

    step: Callable[[], float]
    close: Callable[[], None] = lambda: None
    engine: Any = None  # Partita's


@dataclass(frozen=True)
class Entry:
    """How to build a pipeline; which of Partita's has the same schedule; what it is, for the table."""

    build: Callable[[PipelineTask], Pipeline]
    about: str
    same_schedule: str = ""


def adamw(parameters: Any, task: PipelineTask) -> AdamW:
    return AdamW(parameters, task.learning_rate, task.betas, task.eps, task.weight_decay, fused=True)


def alone(task: PipelineTask) -> Pipeline:
    """The whole model in one process."""
    model = task.layers(range(len(task.costs)))
    optimizer, data = adamw(model.parameters(), task), task.data()

    def step() -> float:
        total = 0.0
        for tokens, targets in data:
            loss = mean_loss(model(tokens), targets) / len(data)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return Pipeline(step)


def _torch_pipeline(task: PipelineTask, schedule_type: Any, stage_ranks: tuple[int, ...]) -> Pipeline:
    rank, stages = dist.get_rank(), len(stage_ranks)
    own = {n: task.layers(bound) for n, bound in enumerate(task.bounds(stages)) if stage_ranks[n] == rank}
    made = [PipelineStage(module, number, stages, torch.device("cpu")) for number, module in own.items()]
    has_one = len(stage_ranks) == dist.get_world_size()
    schedule = schedule_type(made[0] if has_one else made, task.micro_batches, loss_fn=mean_loss)
    optimizer = adamw([p for module in own.values() for p in module.parameters()], task)
    inputs, targets = (torch.cat(part) for part in zip(*task.data(), strict=True))
    given = (inputs,) if 0 in own else ()
    keywords = {"target": targets} if stages - 1 in own else {}

    def step() -> float:
        losses: list[torch.Tensor] = []
        schedule.step(*given, **keywords, losses=losses, return_outputs=False)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).mean().item() if losses else math.nan

    return Pipeline(step)


def _deepspeed(task: PipelineTask) -> Pipeline:
    with silent():
        deepspeed = library("deepspeed")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        pipe = library("deepspeed.pipe")
        deepspeed.init_distributed("gloo", verbose=False)
        layers = [task.layers(bound) for bound in task.bounds(dist.get_world_size())]
        model = pipe.PipelineModule(layers, len(layers), loss_fn=mean_loss, partition_method="uniform")
        config = _engine_config(task)
        optimizer = None
        if task.deepspeed_adam == "torch":
            optimizer = adamw(model.parameters(), task)
            del config["optimizer"]
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    data = task.data()
    return Pipeline(lambda: float(engine.train_batch(iter(data))), engine.destroy)


def _engine_config(task: PipelineTask) -> dict[str, Any]:
    """The JSON config that DeepSpeed and Partita share."""
    adam = {"lr": task.learning_rate, "betas": list(task.betas), "eps": task.eps, "weight_decay": task.weight_decay}
    return {
        "train_micro_batch_size_per_gpu": task.size,
        "gradient_accumulation_steps": task.micro_batches,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": adam},
        "steps_per_print": 1_000_000,
    }


def _partita(task: PipelineTask, schedule: str, transport: str = "auto") -> Pipeline:
    partita, pipeline = library("partita"), library("partita.pipeline")
    module = pipeline.PipelineModule(
        layers=[make() for make in task.makers()],
        num_stages=dist.get_world_size(),
        loss_fn=mean_loss,
        partition_method="cost",
        layer_costs=task.costs,
    )
    config = _engine_config(task) | {"pipeline": {"schedule": schedule}, "comm": {"transport": transport}}
    engine, *_ = partita.initialize(model=module, config=config)
    data = task.data()
    return Pipeline(lambda: float(engine.train_batch(iter(data))), engine.destroy, engine)


def _of_torch(name: str, stage_ranks: tuple[int, ...], same_schedule: str) -> Entry:
    about = f"torch.distributed.pipelining, {name}"
    return Entry(partial(_torch_named, name=name, stage_ranks=stage_ranks), about, same_schedule)


def _torch_named(task: PipelineTask, name: str, stage_ranks: tuple[int, ...]) -> Pipeline:
    return _torch_pipeline(task, getattr(schedules, name), stage_ranks)


PARTITA = ("gpipe", "1f1b", "interleaved", "looped-bfs", "zb-h1", "zb-h2", "zb-v", "v-half", "v-min", "dualpipe-v")
LOOPED, IN_A_V = (0, 1, 0, 1), (0, 1, 1, 0)

ENGINES: Mapping[str, Entry] = {
    "torch:gpipe": _of_torch("ScheduleGPipe", (0, 1), "partita:gpipe"),
    "torch:1f1b": _of_torch("Schedule1F1B", (0, 1), "partita:1f1b"),
    "torch:interleaved": _of_torch("ScheduleInterleaved1F1B", LOOPED, "partita:interleaved"),
    "torch:looped-bfs": _of_torch("ScheduleLoopedBFS", LOOPED, "partita:looped-bfs"),
    "torch:interleaved-zb": _of_torch("ScheduleInterleavedZeroBubble", LOOPED, "partita:zb-h1"),
    "torch:zb-v": _of_torch("ScheduleZBVZeroBubble", IN_A_V, "partita:zb-v"),
    "torch:dualpipe-v": _of_torch("ScheduleDualPipeV", IN_A_V, "partita:dualpipe-v"),
    "deepspeed:1f1b": Entry(_deepspeed, "DeepSpeed's PipelineEngine", "partita:1f1b"),
    **{f"partita:{name}": Entry(partial(_partita, schedule=name), f"Partita, {name}") for name in PARTITA},
    **{
        f"partita-gloo:{name}": Entry(partial(_partita, schedule=name, transport="torch"), f"Partita, {name}, gloo")
        for name in PARTITA
    },
}
