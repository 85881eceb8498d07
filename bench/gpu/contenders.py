"""The training loops under comparison, as engines of `bench/peers`; a task's model has fp32 weights on the device."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from engines import ENGINES, Engine
from torch import Tensor, nn
from torch.optim import AdamW
from workload import Task

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INITIAL_SCALE_POWER = 12


def build(name: str, task: Task, device: torch.device) -> Engine:
    """`partita0`, `partita1-split`, `torch-masters`, `torch-autocast`, `torch-foreach`, `deepspeed1`, ..."""
    if name.startswith("partita"):
        stage, _, masters = name.removeprefix("partita").partition("-")
        return partita_engine(task, partita_config(task, int(stage), split=masters == "split"))
    if name.startswith("deepspeed"):
        return _deepspeed(name, task, device)
    return TORCH_LOOPS[name](task, device)


def partita_config(task: Task, stage: int, *, split: bool = False, accumulation: int = 1) -> dict[str, Any]:
    """AdamW, clipping, no output while training."""
    optimizer = {"lr": task.learning_rate, "betas": list(task.betas), "eps": task.eps}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": task.clip,
        "optimizer": {"type": "AdamW", "params": {**optimizer, "weight_decay": task.weight_decay}},
        "zero_optimization": {"stage": stage},
        "steps_per_print": 0,
    }
    if task.dtype == "bf16":
        config["bf16"] = {"enabled": True, **({"master_weights": "split"} if split else {})}
    if task.dtype == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": INITIAL_SCALE_POWER}
    return config


def partita_engine(task: Task, config: dict[str, Any]) -> Engine:
    import partita

    engine, *_ = partita.initialize(model=task.build_model(), config=config)

    def forward_backward(*batch: Tensor) -> Tensor:
        loss: Tensor = engine(*batch)
        engine.backward(loss)
        return loss.detach()

    return Engine(forward_backward, engine.step, engine.destroy)


def _deepspeed(name: str, task: Task, device: torch.device) -> Engine:
    os.environ["DS_ACCELERATOR"] = device.type
    # Without these it asks MPI, where it finds that.
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29517")
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    return ENGINES[name].build(task)


def _adamw(parameters: Any, task: Task, *, fused: bool) -> AdamW:
    options: dict[str, Any] = {"fused": True} if fused else {"foreach": True}
    return AdamW(parameters, task.learning_rate, task.betas, task.eps, task.weight_decay, **options)


def _autocast(task: Task, device: torch.device, *, fused: bool = True) -> Engine:
    """fp32 weights, computed with in bf16 under autocast: the usual loop."""
    model = task.build_model()
    optimizer = _adamw(model.parameters(), task, fused=fused)

    def forward_backward(*batch: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=task.dtype == "bf16"):
            loss: Tensor = model(*batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def update() -> None:
        if task.clip:
            nn.utils.clip_grad_norm_(model.parameters(), task.clip, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Engine(forward_backward, update)


def _masters(task: Task, device: torch.device) -> Engine:
    """16-bit weights and gradients, fp32 masters: what Partita does, put together from torch's own parts.

    fp16 goes through a GradScaler; bf16 has no check for overflow at all.
    """
    model = task.build_model()
    masters: list[Tensor] = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    model.to(DTYPES[task.dtype])
    weights: list[Tensor] = list(model.parameters())
    grads = [torch.zeros_like(master) for master in masters]
    for master, grad in zip(masters, grads, strict=True):
        master.grad = grad
    optimizer = _adamw(masters, task, fused=True)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**INITIAL_SCALE_POWER, enabled=task.dtype == "fp16")

    def forward_backward(*batch: Tensor) -> Tensor:
        loss: Tensor = model(*batch)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    @torch.no_grad()
    def update() -> None:
        torch._foreach_copy_(grads, [weight.grad for weight in weights if weight.grad is not None])
        scaler.unscale_(optimizer)
        if task.clip:
            nn.utils.clip_grad_norm_(masters, task.clip, foreach=True)
        scaler.step(optimizer)
        scaler.update()
        torch._foreach_copy_(weights, masters)
        model.zero_grad(set_to_none=True)

    return Engine(forward_backward, update)


TORCH_LOOPS: dict[str, Callable[[Task, torch.device], Engine]] = {
    "torch-masters": _masters,
    "torch-autocast": _autocast,
    "torch-fused": _autocast,
    "torch-foreach": lambda task, device: _autocast(task, device, fused=False),
}
