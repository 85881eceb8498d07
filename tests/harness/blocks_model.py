"""A model as those that stage 3 is for: repeated blocks, and around them an embedding, a tied head, a shared scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import inside
import partita
import torch
import torch.nn.functional as F
from support import global_batch
from torch import Tensor, nn

# Parameters of stage 3 are mapped between ranks that share memory, and gathered where they do not.
TRANSPORTS = ("shared_memory", "torch")
ADAM: dict[str, Any] = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}}
SGD: dict[str, Any] = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "split": {"bf16": {"enabled": True, "master_weights": "split"}},
    "fp16": {"fp16": {"enabled": True, "loss_scale": 256}},
}


class Block(nn.Module):
    """Shapes that nothing divides; `scale` is all blocks'."""

    def __init__(self, width: int, scale: nn.Parameter) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, 2 * width + 1)
        self.back = nn.Linear(2 * width + 1, width)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.back(F.gelu(self.mix(self.norm(x)))) * self.scale


class Body(nn.Module):
    """Runs its blocks in the order of `order`."""

    def __init__(self, width: int, blocks: int, block: Callable[[int, nn.Parameter], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.scale = nn.Parameter(torch.ones(1))
        self.blocks = nn.ModuleList(block(width, self.scale) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.order = list(range(blocks))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for i in self.order:
            x = self.blocks[i](x)
        return self.norm(x)


class BlocksModel(nn.Module):
    """`model(tokens, targets)` is a loss, `model(tokens)` logits. The head is tied to the embedding."""

    def __init__(
        self, blocks: int = 4, width: int = 7, block: Callable[[int, nn.Parameter], nn.Module] = Block
    ) -> None:
        super().__init__()
        self.body = Body(width, blocks, block)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.body.embed.weight

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = self.head(self.body(tokens)).float()
        return logits if targets is None else F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def make_blocks(block: Callable[[int, nn.Parameter], nn.Module] = Block, seed: int = 0, **sizes: int) -> BlocksModel:
    torch.manual_seed(seed)
    return BlocksModel(block=block, **sizes)


def config_for(
    stage: int = 3,
    transport: str = "torch",
    precision: str = "fp32",
    zero: dict[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Without persistent parameters; a block has several units, and parameters lie across the shards of ranks."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": ADAM,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 120,
            "stage3_param_persistence_threshold": 0,
            **(zero or {}),
        },
        "comm": {"transport": transport, "timeout_seconds": 20},
        "steps_per_print": 0,
        **PRECISIONS[precision],
        **changes,
    }


def batch_of(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """A micro-batch, another one on every rank."""
    return global_batch(10 * step + rank, 2)  # type: ignore[return-value]


def take_step(engine: partita.Engine, step: int) -> float:
    """One step on this rank's batch; its loss."""
    loss = engine(*batch_of(step, engine.global_rank))
    engine.backward(loss)
    engine.step()
    return loss.item()


def run_steps(
    model: nn.Module,
    config: dict[str, Any],
    steps: int = 3,
    between: Callable[[partita.Engine, int], Any] | None = None,
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and final weights; `between(engine, step)` comes before each step."""
    engine = partita.Engine(model=model, config=config)
    losses = []
    for step in range(steps):
        if between is not None:
            between(engine, step)
        losses.append(take_step(engine, step))
        assert inside.gathered_bytes(engine) == 0, f"after step {step}"
    weights = engine.module_state_dict()
    assert inside.gathered_bytes(engine) == 0
    engine.destroy()
    return losses, weights


def assert_same_weights(actual: dict[str, Tensor], expected: dict[str, Tensor], where: str = "") -> None:
    """Bit for bit."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, f"{name} {where}"
        assert torch.equal(actual[name], value), f"{name} {where}: {(actual[name] - value).abs().max()}"


def assert_trains_as_stage_0(
    make: Callable[[], nn.Module],
    config: dict[str, Any],
    between: Callable[[partita.Engine, int], Any] | None = None,
    steps: int = 3,
    reference: Callable[[], nn.Module] | None = None,
) -> None:
    """Losses and weights have the same bits as in stage 0, where `between` is not called."""
    plain = {**config, "zero_optimization": {**config["zero_optimization"], "stage": 0}}
    expected_losses, expected = run_steps((reference or make)(), plain, steps)
    losses, weights = run_steps(make(), config, steps, between)
    assert losses == expected_losses
    assert_same_weights(weights, expected)
    assert not torch.equal(expected["body.scale"], torch.ones_like(expected["body.scale"]))  # it was trained


def error_of(function: Callable[[], Any], kind: type[BaseException] = Exception) -> str:
    """The message of the error that the function must raise."""
    try:
        function()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")
