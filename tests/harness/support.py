"""What the multi-rank tests share: an odd-shaped model, data, and the plain PyTorch run that the engine must equal."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any

import partita
import torch
import torch.nn.functional as F
from partita.zero import AbsentParameterError, GatheredParameters
from torch import Tensor, nn


class OddModel(nn.Module):
    """Shapes that nothing divides; a parameter of one element, tied weights, a buffer."""

    def __init__(self, width: int = 13) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.mix = nn.Linear(width, 2 * width + 1)
        self.scale = nn.Parameter(torch.ones(1))
        self.norm = nn.LayerNorm(2 * width + 1)
        self.back = nn.Linear(2 * width + 1, width, bias=False)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("offset", torch.linspace(0, 1, width))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens) + self.offset.to(self.embed.weight.dtype)
        x = x + self.back(F.gelu(self.norm(self.mix(x)))) * self.scale
        return F.cross_entropy(self.head(x).float().flatten(0, -2), targets.flatten())


def make_model(seed: int = 0) -> OddModel:
    torch.manual_seed(seed)
    return OddModel()


def global_batch(step: int, samples: int) -> tuple[Tensor, Tensor]:
    """The same on every rank; each rank takes its part."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, 11, (samples, 6), generator=generator)
    return tokens, torch.randint(0, 11, (samples, 6), generator=generator)


def part(batch: tuple[Tensor, ...], rank: int, world_size: int) -> tuple[Tensor, ...]:
    return tuple(t.chunk(world_size)[rank] for t in batch)


def base_config(**changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
        # Without persistent parameters, so that those of tests, which are all small, come and go in stage 3.
        "zero_optimization": {"stage": 0, "reduce_bucket_size": 300, "stage3_param_persistence_threshold": 0},
        "steps_per_print": 0,
    }
    for key, value in changes.items():
        if key in ("stage", "reduce_bucket_size", "allgather_bucket_size", "overlap_comm", "reduce_scatter"):
            config["zero_optimization"][key] = value
        else:
            config[key] = value
    return config


def is_partitioned(engine: partita.Engine) -> bool:
    """Whether parameters come and go."""
    return engine.config.zero_optimization.stage == 3 and engine.world_size > 1


def is_mapped(stage: int, transport: str) -> bool:
    """Whether parameters come without any collective, over what pytest calls `transport`."""
    return stage == 3 and transport == "auto"


def whole(engine: partita.Engine, *written: nn.Parameter) -> AbstractContextManager[None]:
    """In this block the model's parameters have their values: in stage 3 gathered, below as they always are. With
    `written` only those, and the block writes to them."""
    rank = engine.world_size - 1 if written else None
    return GatheredParameters(written or engine.module.parameters(), rank, enabled=is_partitioned(engine))


def load(engine: partita.Engine, weights: dict[str, Tensor]) -> None:
    """`load_state_dict()`, which in stage 3 refuses by name, and what takes its place there."""
    if not is_partitioned(engine):
        engine.module.load_state_dict(weights)
        return
    name = next(iter(weights))
    try:
        engine.module.load_state_dict(weights)
    except RuntimeError as error:
        assert f"parameter '{name}' is used" in str(error) and "GatheredParameters" in str(error), error
    else:
        raise AssertionError("load_state_dict() into partitioned parameters is not refused")
    engine.load_module_state_dict(weights)


def assert_absent(engine_or_model: Any) -> None:
    """Each parameter refuses to be read, by its name."""
    for name, parameter in getattr(engine_or_model, "module", engine_or_model).named_parameters():
        try:
            parameter.sum()
        except AbsentParameterError as error:
            assert f"'{name}'" in str(error), error
        else:
            raise AssertionError(f"{name} can be read")


def assert_without_values(model: nn.Module) -> None:
    """An engine that partitioned the parameters was destroyed: their use is refused by name, also by the next engine,
    until they have memory again."""
    names = list(dict(model.named_parameters()))
    for name, parameter in model.named_parameters():
        for use in (parameter.sum, parameter.clone, lambda p=parameter: p.add_(1), lambda p=parameter: p + 1):
            try:
                use()
            except AbsentParameterError as error:
                assert f"'{name}'" in str(error) and "was destroyed" in str(error) and "to_empty" in str(error), error
            else:
                raise AssertionError(f"{name} can be used")
    try:
        partita.Engine(model, config=base_config(stage=0))
    except AbsentParameterError as error:
        assert f"'{names[0]}'" in str(error), error
    else:
        raise AssertionError("a model without values is not refused")
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        assert type(parameter) is nn.Parameter, name
        assert not [key for key in vars(parameter) if "partita" in key], name
        parameter.data.fill_(1.0)
        assert parameter.sum().item() == parameter.numel(), name


def train(
    config: dict[str, Any], steps: int = 10, model: nn.Module | None = None
) -> tuple[list[float], dict[str, Tensor], list[float]]:
    """Losses of this rank, final weights and gradient norms of `steps` steps on this rank's parts of global batches."""
    engine = partita.Engine(make_model() if model is None else model, config=config)
    losses, norms = [], []
    for step in range(steps):
        batch = global_batch(step, engine.train_batch_size())
        loss = engine.train_batch(part(batch, engine.global_rank, engine.world_size))
        losses.append(loss.item())
        norms.append(engine.get_global_grad_norm() or 0.0)
    weights = engine.module_state_dict()
    engine.destroy()
    return losses, weights, norms


def train_plain(
    samples: int, steps: int = 10, *, clip: float = 0.0, model: nn.Module | None = None, lr: float = 1e-2
) -> tuple[list[float], dict[str, Tensor], list[float]]:
    """The same training in plain PyTorch: one process, one big batch, torch's AdamW."""
    module = copy.deepcopy(model) if model is not None else make_model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.1)
    losses, norms = [], []
    for step in range(steps):
        loss = module(*global_batch(step, samples))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        norms.append(norm.item())
    return losses, {k: v.detach().clone() for k, v in module.state_dict().items()}, norms
