"""A run that is saved and goes on: its model, its data, and all of its state, on any ranks, stage and precision."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import partita
import torch
import torch.nn.functional as F
from partita.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn
from torch.utils.data import Dataset

WIDTH = 61
BATCH = 12  # divides by 1, 2, 3, 4 and 6 ranks
SAMPLES = 52
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "split": {"bf16": {"enabled": True, "master_weights": "split"}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 6, "loss_scale_window": 2}},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
    "SGD": {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}},
    "Adagrad": {"type": "Adagrad", "params": {"lr": 0.05}},
}
STATES = {"AdamW": ("exp_avg", "exp_avg_sq"), "SGD": ("momentum_buffer",), "Adagrad": ("sum",)}


class Numbers(Dataset[Tensor]):
    """Every sample begins with its own number."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        values = torch.randn(6, generator=torch.Generator().manual_seed(index))
        values[0] = index / SAMPLES
        return values


class Model(nn.Module):
    """A frozen layer, buffers (one that no state dict has), tied and lone parameters, odd sizes, one without elements.

    Args:
        noise: of three generators, in forward.
        by_batch: a buffer follows the batches of this rank. So the ranks of another number have other values.
    """

    def __init__(self, seed: int, noise: bool = False, by_batch: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.noise, self.by_batch = noise, by_batch
        self.frozen = nn.Linear(6, WIDTH)
        self.frozen.requires_grad_(False)
        self.register_buffer("mean", torch.rand(WIDTH))
        self.register_buffer("count", torch.tensor(seed))
        self.register_buffer("cache", torch.rand(3), persistent=False)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.tied = nn.Linear(WIDTH, WIDTH, bias=False)
        self.tied.weight = self.layers[0].weight
        self.one = nn.Parameter(torch.rand(()))
        self.none = nn.Parameter(torch.empty(0, 3))
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += [round(value * SAMPLES) for value in x[:, 0].tolist()]
        x = self.frozen(x.to(self.frozen.weight.dtype))
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.float().mean(0) if self.by_batch else 1.0, alpha=0.1)
            self.count.add_(1)
        x = x - self.mean.to(x.dtype)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        if self.noise:
            x = F.dropout(x, 0.3) + random.random() + float(np.random.rand())
        return (self.tied(x).float() * self.one).square().mean() + self.none.float().sum()


def config_for(
    ranks: int, stage: int, precision: str, optimizer: str = "AdamW", *, bucket: int = 60, **changes: Any
) -> dict[str, Any]:
    """A config of a run on so many ranks; `changes` of zero_optimization begin with "zero_"."""
    zero = {"stage": stage, "reduce_bucket_size": bucket, "stage3_param_persistence_threshold": 0}
    zero |= {key.removeprefix("zero_"): changes.pop(key) for key in list(changes) if key.startswith("zero_")}
    return {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH // ranks,
        "zero_optimization": zero,
        "optimizer": OPTIMIZERS[optimizer],
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 8, "warmup_max_lr": 0.05}},
        "steps_per_print": 0,
        **PRECISIONS[precision],
        **changes,
    }


def engine_for(config: dict[str, Any], seed: int, noise: bool = False, by_batch: bool = True) -> partita.Engine:
    """An engine whose model and random numbers follow from the seed."""
    random.seed(seed)
    np.random.seed(seed)
    return partita.Engine(Model(seed, noise, by_batch), train_data=Numbers(), config=config)


def take_steps(engine: partita.Engine, steps: int) -> dict[str, Any]:
    """What is seen of some steps, and this rank's samples of each."""
    found: dict[str, Any] = {"losses": [], "norms": [], "lr": [], "samples": []}
    for _ in range(steps):
        engine.module.seen.clear()
        found["losses"].append(engine.train_batch().item())
        found["norms"].append(engine.get_global_grad_norm())
        found["lr"].append(engine.get_lr())
        found["samples"].append(list(engine.module.seen))
    return found


def whole_state(engine: partita.Engine, optimizer: str) -> dict[str, Any]:
    """All weights, buffers of the state dict, masters, states and counters, on every rank."""
    state: dict[str, Any] = {f"weight {name}": value for name, value in engine.module_state_dict().items()}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            state[f"master {name}"] = safe_get_full_fp32_param(parameter)
            for key in STATES[optimizer]:
                state[f"{key} {name}"] = safe_get_full_optimizer_state(parameter, key)
    state["counts"] = (engine.global_steps, engine.global_samples, engine.skipped_steps, engine.get_lr())
    return state


def digest_of(state: dict[str, Any]) -> str:
    """Of all bits of a `whole_state()`: one short text, which processes tell each other."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted(state.items()):
        bits = (
            value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            if torch.is_tensor(value)
            else b""
        )
        digest.update(repr((name, getattr(value, "dtype", value), getattr(value, "shape", ()))).encode() + bits)
    return digest.hexdigest()


def train_and_save(folder: str, config: dict[str, Any], optimizer: str = "AdamW", steps: int = 3) -> dict[str, Any]:
    """A run that saves after some steps; its state then."""
    engine = engine_for(config, seed=1)
    take_steps(engine, steps)
    assert engine.save_checkpoint(folder, client_state={"note": ["kept", 2**80]}) == Path(folder, f"global_step{steps}")
    state = whole_state(engine, optimizer)
    engine.destroy()
    return state


def differences(ours: dict[str, Any], theirs: dict[str, Any], *, leave_out: str = "") -> list[str]:
    """The names of what is not the same bits. `leave_out`: the beginning of names that are not compared."""
    names = [name for name in {**ours, **theirs} if not (leave_out and name.startswith(leave_out))]
    return [name for name in names if not _same(ours.get(name), theirs.get(name))]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)
