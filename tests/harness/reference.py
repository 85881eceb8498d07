"""The same training twice: by the engine on several ranks, and by a few lines of plain PyTorch on one process.

SGD with momentum shows every error of a gradient, where Adam would hide a wrong factor.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import partita
import torch
from communicators import communicating_through
from support import base_config, make_model
from torch import Tensor, nn

SGD = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "loss_scale": 256}},
}
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

MicroBatch = Callable[[Callable[..., Any], Callable[..., Any], int, int], None]


@dataclass(frozen=True)
class Training:
    """What to train: `micro_batch(forward, backward, step, index)` runs one; `index` counts over all ranks."""

    make: Callable[[], nn.Module]
    micro_batch: MicroBatch
    steps: int = 3


@dataclass(frozen=True)
class Outcome:
    """After the last step; norms of every step."""

    weights: dict[str, Tensor]
    norms: list[float]


def sgd_config(**changes: Any) -> dict[str, Any]:
    return base_config(optimizer=SGD, **changes)


def tokens_of(step: int, index: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + index)
    tokens = torch.randint(0, 11, (2, 2, 6), generator=generator)
    return tokens[0], tokens[1]


def numbers(step: int, index: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * step + index))


def one_backward(forward: Any, backward: Any, step: int, index: int) -> None:
    backward(forward(*tokens_of(step, index)))


def three_backwards(forward: Any, backward: Any, step: int, index: int) -> None:
    for i in range(3):
        backward(forward(*tokens_of(step, index + 100 * i)))


ODD_MODEL = Training(make_model, one_backward)


def train_in_engine(
    training: Training, config: dict[str, Any], wrap: Any = None, backward: str = "engine.backward"
) -> Outcome:
    """`backward`: "engine.backward", "loss.backward" or "engine.scale"."""
    through: AbstractContextManager[Any] = nullcontext() if wrap is None else communicating_through(wrap)
    with through:
        engine = partita.Engine(model=training.make(), config=config)
        norms = []
        for step in range(training.steps):
            for i in range(engine.gradient_accumulation_steps()):
                index = i * engine.world_size + engine.global_rank
                training.micro_batch(engine, backward_of(engine, backward), step, index)
                engine.step()
            norms.append(engine.get_global_grad_norm() or 0.0)
        weights = engine.module_state_dict()
        engine.destroy()
    return Outcome(weights, norms)


def backward_of(engine: partita.Engine, kind: str) -> Callable[..., Any]:
    if kind == "engine.backward":
        return engine.backward
    if kind == "engine.scale":
        return lambda loss, **kwargs: engine.scale(loss).backward(**kwargs)
    return lambda loss, **kwargs: loss.backward(**kwargs)


def train_plain(
    training: Training, micro_batches: int, dtype: torch.dtype | None = None, named: dict[str, Any] = SGD
) -> Outcome:
    """All micro-batches on one process; gradients averaged in fp32, fp32 masters. float16 losses are scaled by
    256. `named` is the optimizer as the config names it."""
    model = training.make()
    trained = [p for p in model.parameters() if p.requires_grad]
    masters = [p.detach().float().clone() for p in trained]
    optimizer = getattr(torch.optim, named["type"])(masters, **named["params"])
    if dtype is not None:
        for p in model.parameters():
            p.data = p.data.to(dtype)
    scale = 256.0 if dtype is torch.float16 else 1.0
    norms = []
    for step in range(training.steps):
        for master in masters:
            master.grad = torch.zeros_like(master)
        for index in range(micro_batches):
            training.micro_batch(model, lambda loss, **kw: (loss.float() * scale).backward(**kw), step, index)
            for p, master in zip(trained, masters, strict=True):
                if p.grad is not None:
                    master.grad += p.grad.to_dense().float() / (scale * micro_batches)
                    p.grad = None
        norms.append(torch.cat([m.grad.flatten() for m in masters]).norm().item())
        optimizer.step()
        for p, master in zip(trained, masters, strict=True):
            p.data.copy_(master)
    return Outcome({name: value.detach().clone() for name, value in model.state_dict().items()}, norms)


# A 16-bit parameter may fall on the other side of a rounding boundary; a lost gradient is a hundred times more.
TOLERANCES = {"fp32": (1e-4, 1e-5), "bf16": (2e-2, 1e-2), "fp16": (3e-3, 2e-3)}


def assert_equal_runs(outcomes: list[Outcome], expected: Outcome, precision: str = "fp32") -> None:
    """Every rank's run is the expected one, within what the precision allows."""
    rtol, atol = TOLERANCES[precision]
    for rank, outcome in enumerate(outcomes):
        torch.testing.assert_close(outcome.norms, expected.norms, rtol=rtol, atol=atol / 10)
        assert outcome.weights.keys() == expected.weights.keys()
        for name, value in outcome.weights.items():
            where = f"{name} on rank {rank}"
            torch.testing.assert_close(
                value, expected.weights[name], rtol=rtol, atol=atol, msg=lambda m, w=where: f"{w}: {m}"
            )


def assert_same_runs(outcomes: list[Outcome], expected: list[Outcome]) -> None:
    """Bit for bit, rank by rank."""
    for rank, (outcome, other) in enumerate(zip(outcomes, expected, strict=True)):
        assert outcome.norms == other.norms
        for name, value in outcome.weights.items():
            assert torch.equal(value, other.weights[name]), f"{name} on rank {rank}"
