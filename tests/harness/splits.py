"""One model in a plain engine and in pipelines of any shape, and what its ranks have, in a form that does not depend on
the shape."""

from __future__ import annotations

from typing import Any, NamedTuple

import partita
import torch
from partita.pipeline import PipelineModule
from torch import Tensor, nn
from torch.utils.data import Dataset

WIDTH = 33
LAYERS = 6
TIED, REPLICA = "0.weight", f"{LAYERS - 1}.weight"
MICRO_BATCHES = 4
SAMPLES = 2 * MICRO_BATCHES  # of a step, on any number of ranks


class Split(NamedTuple):
    """pipe: ranks that have the model together; 0: it is in a plain engine. data: copies of it."""

    pipe: int
    data: int
    schedule: str = "1f1b"
    chunks: int | None = None

    @property
    def ranks(self) -> int:
        return max(1, self.pipe) * self.data


SPLITS = {
    "plain x 1": Split(0, 1),
    "plain x 2": Split(0, 2),
    "1 x 1": Split(1, 1),
    "1 x 1, 2 chunks": Split(1, 1, "interleaved", 2),
    "2 x 1": Split(2, 1),
    "2 x 1, 2 chunks": Split(2, 1, "interleaved", 2),
    "2 x 1, V": Split(2, 1, "zb-v"),
    "1 x 2": Split(1, 2),
    "2 x 2": Split(2, 2),
    "3 x 1": Split(3, 1),
    "4 x 1": Split(4, 1),
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "split": {"bf16": {"enabled": True, "master_weights": "split"}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 6}},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
    "SGD": {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}},
}
# (parameter, quantity) -> runs of its elements: the number of the first one, and their values.
Pieces = dict[tuple[str, str], list[tuple[int, Tensor]]]


class Dense(nn.Linear):
    """In the dtype of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x.to(self.weight.dtype)))


class Scale(nn.Module):
    """A parameter with one element, one without, and buffers, of which a state dict leaves out one."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))
        self.none = nn.Parameter(torch.empty(0, 3))
        self.register_buffer("seen", torch.tensor(by))
        self.register_buffer("hidden", torch.rand(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.add_(1)
        return x * self.by + self.none.sum()


def loss_of(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs.float() - labels).square().mean()


class Whole(nn.Sequential):
    """The layers as a plain engine has them, with their names in a pipeline."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return loss_of(super().forward(x), labels)


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Inputs and labels."""

    def __len__(self) -> int:
        return 52

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, labels = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(index))
        return x, labels


def sequential(seed: int, *, tied: bool = False) -> Whole:
    """The whole model: a frozen layer, buffers, odd sizes. tied: the first and the last layer have one weight."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [Dense(WIDTH, WIDTH, bias=i != LAYERS - 1) for i in range(LAYERS)]
    layers[1], layers[4] = Scale(0.5 + seed), Scale(1.0)
    layers[2].requires_grad_(False)
    if tied:
        layers[-1].weight = layers[0].weight
    return Whole(*layers)


def config_for(split: str, stage: int, precision: str, optimizer: str = "AdamW", **changes: Any) -> dict[str, Any]:
    shape = SPLITS[split]
    pipeline = {"schedule": shape.schedule, **({} if shape.chunks is None else {"chunks": shape.chunks})}
    return {
        "train_batch_size": SAMPLES,
        "train_micro_batch_size_per_gpu": SAMPLES // MICRO_BATCHES // shape.data,
        "optimizer": OPTIMIZERS[optimizer],
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 8, "warmup_max_lr": 0.05}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1500},
        "steps_per_print": 0,
        **({"pipeline": pipeline} if shape.pipe else {}),
        **PRECISIONS[precision],
        **changes,
    }


def engine_for(config: dict[str, Any], split: str, seed: int, tied: bool = False) -> Any:
    """An engine of either kind, with data."""
    layers = sequential(seed, tied=tied)
    model: nn.Module = layers
    if SPLITS[split].pipe:
        model = PipelineModule([*layers], SPLITS[split].pipe, loss_fn=loss_of, partition_method="uniform")
    engine, *_ = partita.initialize(model=model, training_data=Pairs(), config=config)
    return engine


def take_steps(engine: Any, steps: int) -> list[float]:
    """The mean losses of all ranks of a pipeline, or those of this rank of a plain engine."""
    return [engine.train_batch().item() for _ in range(steps)]


def pieces_of(engine: Any) -> Pieces:
    """What this rank has of masters, moments, weights and buffers."""
    found: Pieces = {}
    for quantity in engine.train_state().quantities():
        flat = quantity.read()
        for s in quantity.slices:
            key = (s.slot.name, quantity.name)
            found.setdefault(key, []).append((s.parameter_offset, flat[s.in_shard].detach().clone()))
    for name, tensor in engine.module_state_dict().items():
        found[name, "stored"] = [(0, tensor.reshape(-1))]
    return found


def counts_of(engine: Any) -> tuple[Any, ...]:
    """The same on all ranks."""
    return engine.global_steps, engine.global_samples, engine.skipped_steps, engine.loss_scale, engine.get_lr()


def whole(told: list[Pieces], *, tied: bool = False) -> dict[str, Tensor]:
    """The state of all ranks, as bits. What several ranks have is the same there; a tied weight has one name."""
    found: dict[str, dict[int, int]] = {}
    for pieces in told:
        for (name, quantity), runs in pieces.items():
            values = found.setdefault(f"{quantity} {TIED if tied and name == REPLICA else name}", {})
            for first, run in runs:
                for i, value in enumerate(run.view(torch.int16 if run.itemsize == 2 else torch.int32).tolist(), first):
                    assert values.setdefault(i, value) == value, (name, quantity, i)
    return {key: torch.tensor([values[i] for i in range(len(values))]) for key, values in found.items()}
