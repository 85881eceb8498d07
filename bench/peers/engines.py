"""The engines under comparison, one entry each in `ENGINES`.

An engine gets a `Task` and answers with three functions; how it shards, overlaps and casts is its own affair.
In bf16 every engine keeps fp32 master weights: alone, DDP and ZeroRedundancyOptimizer train fp32 weights under autocast
(the usual way), FSDP2 gathers its fp32 shards as bf16, DeepSpeed and Partita hold bf16 weights beside the masters.

A warning about `deepspeed0` in 16 bits is expected with DeepSpeed 0.19: at start it steps once with zero gradients to
create the optimizer's state, and Adam's bias correction counts that step: its first updates are up to a quarter short.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from workload import Task


@dataclass
class Engine:
    """A model in training. `forward_backward(*batch)` gives the loss of this rank; `update()` is the optimizer step."""

    forward_backward: Callable[..., Tensor]
    update: Callable[[], None]
    close: Callable[[], None] = lambda: None

    def step(self, *batch: Tensor) -> Tensor:
        loss = self.forward_backward(*batch)
        self.update()
        return loss


@dataclass(frozen=True)
class Entry:
    """How to build an engine, the dtypes it can train in, and what it is, for the table."""

    build: Callable[[Task], Engine]
    about: str
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    communicates: bool = True
    sharded_step: bool = False
    sixteen_bit_weights: bool = False  # in bf16 and fp16: holds such weights and fp32 masters itself


class NotAvailableError(Exception):
    """The engine's library is not installed, or cannot be imported."""


def _adamw(parameters: Any, task: Task) -> AdamW:
    return AdamW(parameters, task.learning_rate, task.betas, task.eps, task.weight_decay, fused=True)


def _torch_engine(model: nn.Module, optimizer: Optimizer, task: Task, autocast: bool = True) -> Engine:
    """The usual torch training loop around a model that may reduce its gradients by itself."""

    def forward_backward(*batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and task.dtype == "bf16"):
            loss: Tensor = model(*batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def update() -> None:
        if task.clip:
            nn.utils.clip_grad_norm_(model.parameters(), task.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Engine(forward_backward, update)


def _alone(task: Task) -> Engine:
    model = task.build_model()
    return _torch_engine(model, _adamw(model.parameters(), task), task)


def _ddp(task: Task) -> Engine:
    model = DistributedDataParallel(task.build_model(), gradient_as_bucket_view=True)
    return _torch_engine(model, _adamw(model.parameters(), task), task)


def _zro(task: Task) -> Engine:
    model = DistributedDataParallel(task.build_model(), gradient_as_bucket_view=True)
    settings: dict[str, Any] = {"lr": task.learning_rate, "betas": task.betas, "eps": task.eps, "fused": True}
    optimizer = ZeroRedundancyOptimizer(model.parameters(), AdamW, weight_decay=task.weight_decay, **settings)
    return _torch_engine(model, optimizer, task)


def _fsdp2(task: Task) -> Engine:
    model = task.build_model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if task.dtype == "bf16" else None)
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return _torch_engine(model, _adamw(model.parameters(), task), task, autocast=False)


def _engine_config(task: Task, stage: int) -> dict[str, Any]:
    """The JSON config that DeepSpeed and Partita share."""
    optimizer = {"lr": task.learning_rate, "betas": list(task.betas), "eps": task.eps}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": task.clip,
        "optimizer": {"type": "AdamW", "params": {**optimizer, "weight_decay": task.weight_decay}},
        "zero_optimization": {"stage": stage},
    }
    if task.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if task.dtype == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 12}
    return config


def _config_engine(engine: Any) -> Engine:
    """The training loop of engines called the DeepSpeed way."""

    def forward_backward(*batch: Tensor) -> Tensor:
        loss: Tensor = engine(*batch)
        engine.backward(loss)
        return loss.detach()

    return Engine(forward_backward, engine.step, engine.destroy)


def _deepspeed(task: Task, stage: int) -> Engine:
    with silent():
        deepspeed = library("deepspeed")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        model, config = task.build_model(), _engine_config(task, stage)
        optimizer: Optimizer | None = None
        if task.deepspeed_adam == "torch":
            optimizer = _adamw(model.parameters(), task)
        elif task.deepspeed_adam == "cpu":
            adam = deepspeed.ops.adam.DeepSpeedCPUAdam
            optimizer = adam(model.parameters(), task.learning_rate, betas=task.betas, weight_decay=task.weight_decay)
        if optimizer is not None:
            del config["optimizer"]
        # Measured: no slower than the default of 5e8 elements, or than overlap_comm, in any stage and dtype.
        config["zero_optimization"]["reduce_bucket_size"] = max(task.numel // 4, 2**22)
        if task.dtype == "fp16":  # refused on a processor without fp16 instructions, of which the step needs none
            deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return _config_engine(engine)


def _partita(task: Task, stage: int, transport: str = "auto") -> Engine:
    config = _engine_config(task, stage) | {"comm": {"transport": transport}, "steps_per_print": 0}
    engine, *_ = library("partita").initialize(model=task.build_model(), config=config)
    return _config_engine(engine)


def library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise NotAvailableError("not installed" if error.name == name else f"cannot be imported: {error}") from error
    except ImportError as error:
        raise NotAvailableError(f"cannot be imported: {error}") from error


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Swallow what a library prints while it starts (its log handlers keep the swallowed stream)."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _staged(build: Callable[[Task, int], Engine], stage: int) -> Entry:
    return Entry(
        build=lambda task: build(task, stage),
        about=f"ZeRO stage {stage}" if stage else "no sharding",
        dtypes=("fp32", "bf16", "fp16"),
        sharded_step=stage > 0,
        sixteen_bit_weights=True,
    )


ENGINES: dict[str, Entry] = {
    "alone": Entry(_alone, "torch, each rank by itself on its own data", communicates=False),
    "ddp": Entry(_ddp, "torch DistributedDataParallel"),
    "zro": Entry(_zro, "torch ZeroRedundancyOptimizer on DDP", sharded_step=True),
    "fsdp2": Entry(_fsdp2, "torch fully_shard per block", sharded_step=True),
    **{f"deepspeed{stage}": _staged(_deepspeed, stage) for stage in (0, 1, 2, 3)},
    **{f"partita{stage}": _staged(_partita, stage) for stage in (0, 1, 2, 3)},
    **{f"partita{stage}-gloo": _staged(partial(_partita, transport="torch"), stage) for stage in (0, 1, 2, 3)},
}
