"""A model whose gradients are what the test says, and plain PyTorch stepping on the same gradients.

All values are small multiples of 1/16, so gradients, their shares on 1, 2 and 4 ranks and their mean are exact in every
dtype: what differs from the reference differs in the optimizer, not in the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import inside
import partita
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# Shards have whole pages where ranks share memory; "e" has elements in those of 4 ranks, in 16 bits too.
SHAPES: dict[str, tuple[int, ...]] = {"a": (5, 7), "b": (1,), "c": (33,), "d": (3, 1, 2), "e": (14001,)}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8, "hysteresis": 1000}},
}
SPLIT: dict[str, Any] = {"bf16": {"enabled": True, "master_weights": "split"}}


class Dictated(nn.Module):
    """`loss.backward()` gives parameter `name` the gradient `grads[name]`; without an entry it gets none."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]] = SHAPES, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))

    def forward(self, grads: Mapping[str, Tensor]) -> Tensor:
        terms = [(p.float() * grads[name]).sum() for name, p in self.named_parameters() if name in grads]
        return torch.stack(terms).sum()


def dictate(step: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    """The mean gradients of a step."""
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randint(-31, 32, shape, generator=generator) / 16 for name, shape in shapes.items()}


def share(grads: Mapping[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    """What one rank contributes: no two ranks the same, and their mean is `grads`."""
    return {name: grad * ((2 * rank + 1) / world_size) for name, grad in grads.items()}


def config_for(stage: int = 0, precision: str = "fp32", **changes: Any) -> dict[str, Any]:
    """Units of some 40 elements, so that parameters lie across the shards of ranks."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 40, "stage3_param_persistence_threshold": 0},
        "steps_per_print": 0,
        **PRECISIONS[precision],
        **changes,
    }


def take_step(engine: partita.Engine, grads: Mapping[str, Tensor]) -> None:
    """One optimizer step on mean gradients `grads`."""
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(share(grads, engine.global_rank, engine.world_size)))
        engine.step()


def masters(engine: partita.Engine) -> dict[str, Tensor]:
    """The fp32 weights by parameter; NaN where another rank has them."""
    result = {}
    for unit in inside.units(engine):
        for slot in unit.layout.slots:
            result[slot.name] = torch.full((slot.numel,), float("nan"))
        for s in unit.layout.slices(unit.own):
            piece = unit.full_precision()[s.shard_offset : s.shard_offset + s.numel]
            result[s.slot.name][s.parameter_offset : s.parameter_offset + s.numel] = piece
    return result


def merged(by_rank: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The fp32 weights, flat, from what each rank has of them."""
    result = {name: torch.full_like(value, float("nan")) for name, value in by_rank[0].items()}
    for pieces in by_rank:
        for name, piece in pieces.items():
            result[name] = torch.where(piece.isnan(), result[name], piece)
    return result


def plain(
    make: Callable[[nn.Module], Optimizer],
    steps: Sequence[Mapping[str, Tensor]],
    *,
    clip: float = 0.0,
    schedule: Callable[[Optimizer], Any] | None = None,
    seed: int = 0,
) -> tuple[dict[str, Tensor], list[float]]:
    """fp32 weights, flat, and gradient norms of plain PyTorch; a missing gradient counts as zeros."""
    module = Dictated(seed=seed)
    optimizer = make(module)
    scheduler = None if schedule is None else schedule(optimizer)
    norms = []
    for grads in steps:
        for name, parameter in module.named_parameters():
            parameter.grad = grads[name].clone() if name in grads else torch.zeros_like(parameter)
        norms.append(nn.utils.clip_grad_norm_(module.parameters(), clip or float("inf")).item())
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return {name: p.detach().flatten() for name, p in module.named_parameters()}, norms


def assert_follows(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-6) -> None:
    """Equal within the rounding of fp32."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name].float().flatten(), value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
