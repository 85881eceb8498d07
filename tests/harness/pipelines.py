"""Models as pipelines, trained by the engine, and the same in a few lines of plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import partita
import torch
import torch.nn.functional as F
from partita.pipeline import LayerSpec, PipelineModule, TiedLayerSpec
from torch import Tensor, nn

WORDS, WIDTH = 23, 12
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "split": {
        "bf16": {"enabled": True, "master_weights": "split"},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
    },
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2}},
}


class Block(nn.Module):
    """A residual layer, all of whose operations give the same bits for the same input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor, *skipped: Tensor) -> Tensor:
        y = x
        for more in skipped:
            y = y + torch.tanh(more)
        return x + self.down(torch.tanh(self.up(self.norm(y))))


class Embedded(nn.Embedding):
    """An embedding that can be the head, too."""

    def as_head(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


def as_head(embedding: Embedded, x: Tensor) -> Tensor:
    return embedding.as_head(x)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten())


@dataclass(frozen=True)
class Shape:
    """What a model is. skips: as PipelineModule has them, with layer 0 the embedding."""

    blocks: int = 6
    tied: bool = False
    skips: dict[int, list[int]] = field(default_factory=dict)

    def specs(self) -> list[Any]:
        tie = [
            TiedLayerSpec("words", Embedded, WORDS, WIDTH),
            TiedLayerSpec("words", Embedded, WORDS, WIDTH, forward_fn=as_head),
        ]
        first, last = tie if self.tied else (LayerSpec(Embedded, WORDS, WIDTH), LayerSpec(nn.Linear, WIDTH, WORDS))
        return [first, *(LayerSpec(Block, WIDTH) for _ in range(self.blocks)), last]

    def module(self, num_stages: int, **options: Any) -> PipelineModule:
        """The model as a pipeline, with the same values in every division."""
        torch.manual_seed(0)
        return PipelineModule(
            self.specs(), num_stages, loss_fn=cross_entropy, partition_method="uniform", skips=self.skips, **options
        )


def micro_batch(step: int, index: int, sizes: Sequence[int] = (3,)) -> tuple[Tensor, Tensor]:
    """The inputs and labels with this number over all ranks. sizes: of samples, in turns."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    shape = (sizes[index % len(sizes)], 5)
    return torch.randint(WORDS, shape, generator=generator), torch.randint(WORDS, shape, generator=generator)


def config_for(micro_batches: int, **changes: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": micro_batches,
        "optimizer": {"type": "SGD", "params": {"lr": 0.2, "momentum": 0.9, "weight_decay": 0.01}},
        "zero_optimization": {"reduce_bucket_size": 400},
        "steps_per_print": 0,
        **changes,
    }


@dataclass(frozen=True)
class Trained:
    """losses: of each step. norms: of each step. weights: of this rank, in fp32 and by name. evaluated: a loss."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    evaluated: float


def train(
    make: Callable[[], PipelineModule],
    config: dict[str, Any],
    steps: int = 3,
    batch: Callable[[int, int], tuple[Any, Any]] = micro_batch,
) -> Trained:
    """A training on this rank; `batch(step, index)` has an index over all data-parallel ranks."""
    engine, *_ = partita.initialize(model=make(), config=config)
    count = engine.gradient_accumulation_steps()
    copies = engine.train_batch_size() // (count * engine.train_micro_batch_size_per_gpu())
    copy = engine.global_rank % copies

    def batches(step: int) -> Iterator[tuple[Any, Any]]:
        return iter([batch(step, copies * m + copy) for m in range(count)])

    losses, norms = [], []
    for step in range(steps):
        losses.append(engine.train_batch(batches(step)).item())
        norms.append(engine.get_global_grad_norm())
    evaluated = engine.eval_batch(batches(steps)).item()
    weights = {name: value.float() for name, value in engine.module_state_dict().items()}
    engine.destroy()
    return Trained(losses, norms, weights, evaluated)


def merged(by_rank: Sequence[Trained]) -> Trained:
    """What all ranks have together; copies of a parameter must have the same bits, and the rest is the same anyway."""
    weights: dict[str, Tensor] = {}
    for one in by_rank:
        assert (one.losses, one.norms, one.evaluated) == (by_rank[0].losses, by_rank[0].norms, by_rank[0].evaluated)
        for name, value in one.weights.items():
            assert torch.equal(weights.setdefault(name, value), value), name
    return Trained(by_rank[0].losses, by_rank[0].norms, weights, by_rank[0].evaluated)


def plain(
    shape: Shape,
    micro_batches: int,
    copies: int = 1,
    clip: float = 0.0,
    steps: int = 3,
    batch: Callable[[int, int], tuple[Any, Any]] = micro_batch,
) -> Trained:
    """The same training without Partita: the mean loss of all micro-batches, one backward, one step."""
    model = shape.module(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)
    losses, norms = [], []

    def loss_of(step: int) -> Tensor:
        all_of_them = [model(*batch(step, i)) for i in range(micro_batches * copies)]
        return torch.stack(all_of_them).mean()

    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(step)
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip or 1e9).item())
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        evaluated = loss_of(steps).item()
    return Trained(losses, norms, {name: value.detach() for name, value in model.state_dict().items()}, evaluated)
