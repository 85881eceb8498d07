"""Parameters of odd sizes, unused, shared, frozen, checkpointed, and gradients of odd layouts."""

from __future__ import annotations

from functools import partial
from typing import Any

import partita
import pytest
import torch
import torch.nn.functional as F
from communicators import GarbageCommunicator, communicating_through
from reference import (
    DTYPES,
    ODD_MODEL,
    PRECISIONS,
    SGD,
    Training,
    assert_equal_runs,
    assert_same_runs,
    backward_of,
    sgd_config,
    train_in_engine,
    train_plain,
)
from support import base_config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

STAGES = (0, 1, 2)
ADAM = {"type": "AdamW", "params": {"lr": 0.01}}


def numbers(step: int, index: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * step + index))


class Vectors(nn.Module):
    """One parameter for each size, each with a gradient of its own; 0 is a size."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vectors = nn.ParameterList(torch.randn(size) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.vectors[0].dtype)
        return sum((x[i, : v.numel()] * (v + v * v)).sum().float() for i, v in enumerate(self.vectors))


def vectors_micro_batch(sizes: tuple[int, ...], forward: Any, backward: Any, step: int, index: int) -> None:
    backward(forward(numbers(step, index, len(sizes), max(sizes))))


def vectors(*sizes: int) -> Training:
    return Training(partial(Vectors, sizes), partial(vectors_micro_batch, sizes))


@pytest.mark.parametrize("sizes", [(1,), (1, 2, 3), (7, 1, 5, 11), (97, 1, 64)], ids=str)
@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_sizes_that_ranks_do_not_divide(ranks, stage, world_size, sizes):
    """G8. Also fewer elements than ranks."""
    config = sgd_config(stage=stage, reduce_bucket_size=100)
    runs = ranks(world_size).run(train_in_engine, vectors(*sizes), config)
    assert_equal_runs(runs, train_plain(vectors(*sizes), world_size))


def _state_is_finite(config: dict[str, Any]) -> tuple[bool, bool, bool]:
    """Whether buffers held garbage at first; whether optimizer states, and then parameters, are finite after steps."""
    with communicating_through(GarbageCommunicator):
        engine = partita.Engine(model=ODD_MODEL.make(), config=config)
    garbage = any(bool(unit.params.isnan().any()) for unit in engine._units)
    for step in range(2):
        for i in range(engine.gradient_accumulation_steps()):
            ODD_MODEL.micro_batch(engine, engine.backward, step, i)
            engine.step()
    update = engine._sharded._update
    states = getattr(update, "exp_avg", []) + getattr(update, "exp_avg_sq", [])
    states += [s["momentum_buffer"] for s in engine._sharded.inner.state.values()]
    result = garbage, all(bool(s.isfinite().all()) for s in states), all(p.isfinite().all() for p in engine.module.parameters())
    engine.destroy()
    return result


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", [ADAM, SGD], ids=["adam", "sgd"])
@pytest.mark.parametrize("stage", STAGES)
def test_padding_never_reaches_a_result(ranks, stage, optimizer, precision):
    """G8. Buffers come full of NaN; weights, norms and states are as if they came full of zeros."""
    config = base_config(
        stage=stage,
        optimizer=optimizer,
        gradient_accumulation_steps=2,
        communication_data_type="fp32",
        gradient_clipping=0.5,
        data_types={"grad_accum_dtype": "fp32" if precision == "fp32" else "bf16"},  # and so through staging buffers
        **PRECISIONS[precision],
    )
    runs = [ranks(3).run(train_in_engine, ODD_MODEL, config, wrap) for wrap in (None, GarbageCommunicator)]
    assert_same_runs(*runs)
    assert ranks(3).run(_state_is_finite, config) == [(True, True, True)] * 3


@pytest.mark.parametrize("sizes", [(0, 5, 3), (5, 0, 3), (5, 3, 0), (0, 0, 5, 0), (5, 0, 0)], ids=str)
@pytest.mark.parametrize("bucket", [1, 300])
@pytest.mark.parametrize("stage", STAGES)
def test_parameters_without_elements(ranks, stage, bucket, sizes):
    """G9. First, in the middle, last; in a unit with others and alone."""
    training = vectors(*sizes)
    for optimizer in (SGD, ADAM):
        config = base_config(stage=stage, reduce_bucket_size=bucket, optimizer=optimizer, gradient_accumulation_steps=2)
        runs = ranks(2).run(train_in_engine, training, config)
        if optimizer is SGD:
            assert_equal_runs(runs, train_plain(training, 4))


class Branches(nn.Module):
    """Layers of which a micro-batch uses some; the last is never used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))

    def forward(self, x: Tensor, used: list[int]) -> Tensor:
        loss = x.sum()
        for i in used:
            loss = loss + self.layers[i](x).square().mean()
        return loss


def no_layer_on_rank_1(step: int, index: int) -> list[int]:
    return [] if index % 2 else [0, 1, 2]


def layer_1_not_on_rank_1(step: int, index: int) -> list[int]:
    return [0, 2] if index % 2 else [0, 1, 2]


def layer_1_not_in_first_micro_batch(step: int, index: int) -> list[int]:
    return [0, 2] if index < 2 else [0, 1, 2]


def layer_1_not_in_last_micro_batch(step: int, index: int) -> list[int]:
    return [2, 0] if index >= 2 else [0, 1, 2]


def layer_1_not_in_second_step(step: int, index: int) -> list[int]:
    return [0, 2] if step == 1 else [0, 1, 2]


def layer_1_from_second_step_on(step: int, index: int) -> list[int]:
    return [0, 1, 2] if step else [0, 2]


def other_layer_on_each_rank(step: int, index: int) -> list[int]:
    return [(step + index) % 3]


USES = [
    no_layer_on_rank_1,
    layer_1_not_on_rank_1,
    layer_1_not_in_first_micro_batch,
    layer_1_not_in_last_micro_batch,
    layer_1_not_in_second_step,
    layer_1_from_second_step_on,
    other_layer_on_each_rank,
]


def branches_micro_batch(use: Any, forward: Any, backward: Any, step: int, index: int) -> None:
    backward(forward(numbers(step, index, 3, 5).requires_grad_(), use(step, index)))


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("stage", STAGES)
def test_unused_parameters_have_zero_gradients(ranks, stage, use):
    """G11. Unused on one rank, in one micro-batch, in one step or always: no hang, and what a zero gradient gives."""
    training = Training(Branches, partial(branches_micro_batch, use), steps=4)
    config = sgd_config(stage=stage, gradient_accumulation_steps=2, reduce_bucket_size=31)
    assert_equal_runs(ranks(2).run(train_in_engine, training, config), train_plain(training, 4))


@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_without_any_gradient_takes_part_in_fp16(ranks, stage):
    """G11. There is no gradient on rank 1 whose loss scale could be checked."""
    training = Training(Branches, partial(branches_micro_batch, no_layer_on_rank_1))
    runs = ranks(2).run(train_in_engine, training, sgd_config(stage=stage, **PRECISIONS["fp16"]))
    assert_equal_runs(runs, train_plain(training, 2, torch.float16), "fp16")


class Checkpointed(nn.Module):
    """Tied embedding and head, a frozen layer and one that is used in two checkpoints; `reentrant` None: none at all."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.embed = nn.Embedding(11, 6)
        self.shared = nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.own = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self._run(self._first, x)
        x = self._run(self._second, x)
        return F.cross_entropy(self._run(self.head, x).float().flatten(0, -2), targets.flatten())

    def _first(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.frozen(self.shared(x)))

    def _second(self, x: Tensor) -> Tensor:
        return self.shared(torch.tanh(self.own(x))) + self.frozen(x)

    def _run(self, function: Any, x: Tensor) -> Tensor:
        return function(x) if self.reentrant is None else checkpoint(function, x, use_reentrant=self.reentrant)


def checkpointed(reentrant: bool | None) -> Training:
    return Training(partial(Checkpointed, reentrant), ODD_MODEL.micro_batch)


@pytest.mark.parametrize("backward", ["engine.backward", "loss.backward"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_checkpointing_shared_and_frozen_parameters(ranks, stage, reentrant, backward):
    """G12. Gradients that arrive several times in one backward are reduced once, whole."""
    config = sgd_config(stage=stage, gradient_accumulation_steps=2, reduce_bucket_size=40)
    runs = ranks(2).run(train_in_engine, checkpointed(reentrant), config, None, backward)
    assert_equal_runs(runs, train_plain(checkpointed(None), 4))


@pytest.mark.parametrize("backward", ["engine.backward", "loss.backward"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reentrant_checkpointing_in_16_bits(ranks, precision, backward):
    """G12. The loss is scaled once though backward is entered again."""
    config = sgd_config(stage=1, **PRECISIONS[precision])
    runs = ranks(2).run(train_in_engine, checkpointed(True), config, None, backward)
    assert_equal_runs(runs, train_plain(checkpointed(None), 2, DTYPES[precision]), precision)


class OddGradient(torch.autograd.Function):
    """The sum of a matrix times a vector; its gradient with respect to the matrix comes expanded or transposed."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kind, ctx.rows = kind, weight.shape[0]
        return (weight @ x).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        whole = (grad * x).expand(ctx.rows, -1)
        return (whole if ctx.kind == "expanded" else whole.t().contiguous().t()), None, None


class OddGradients(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.weight = nn.Parameter(torch.randn(3, 5))
        self.table = nn.Embedding(7, 5, sparse=kind.startswith("sparse"))
        self.conv = nn.Conv2d(3, 4, 2)
        if kind == "channels_last":
            self.to(memory_format=torch.channels_last)
        if kind == "replaced by a hook":
            self.weight.register_post_accumulate_grad_hook(_transpose_memory)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.table((x[:, 0] * 3).abs().long() % 7)
        image = x.expand(3, *x.shape)[None].to(self.conv.weight.dtype)
        if self.kind == "channels_last":
            image = image.contiguous(memory_format=torch.channels_last)
        if self.kind == "sparse and dense":
            rows = rows + self.table.weight.sum(0)
        odd = OddGradient.apply(self.weight, x[0].to(self.weight.dtype), self.kind)
        return (odd + odd * odd + rows.square().sum() + self.conv(image).square().mean()).float()


def _transpose_memory(parameter: Tensor) -> None:
    parameter.grad = parameter.grad.t().contiguous().t()


def odd_gradient_micro_batch(forward: Any, backward: Any, step: int, index: int) -> None:
    loss = forward(numbers(step, index, 4, 5))
    backward(loss * 0.1)


KINDS = ["expanded", "transposed", "channels_last", "sparse", "sparse and dense", "replaced by a hook"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_of_any_layout(ranks, stage, precision, kind):
    """G15. Sparse ones are densified."""
    training = Training(partial(OddGradients, kind), odd_gradient_micro_batch)
    config = sgd_config(stage=stage, gradient_accumulation_steps=2, reduce_bucket_size=40, **PRECISIONS[precision])
    runs = ranks(2).run(train_in_engine, training, config)
    assert_equal_runs(runs, train_plain(training, 4, DTYPES[precision]), precision)


def _gradient_in_other_dtype(stage: int, dtype: torch.dtype | None, hook: bool) -> float | None:
    """The norm of a gradient of 1 + 2**-12 for a bf16 parameter, which bf16 would round to 1."""
    config = sgd_config(stage=stage, bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"})
    model = nn.Linear(1, 1, bias=False)
    if hook:
        model.weight.grad_dtype = dtype
    engine = partita.Engine(model=model, config=config)
    if not hook:
        model.weight.grad_dtype = dtype
    engine(torch.ones(1, 1, dtype=torch.bfloat16))
    engine.backward(_WithGradient.apply(model.weight, 1 + 2.0**-12).sum())
    engine.step()
    norm = engine.get_global_grad_norm()
    engine.destroy()
    return norm


class _WithGradient(torch.autograd.Function):
    """The parameter in fp32, with a given fp32 gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: float) -> Tensor:
        ctx.value = value
        return weight.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.full_like(grad, ctx.value), None


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no Tensor.grad_dtype")
@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, 1 + 2.0**-12), (torch.bfloat16, 1.0)])
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_of_another_dtype_than_their_parameter(ranks, stage, dtype, expected):
    """G15. `grad_dtype` float32 on a bf16 parameter keeps the gradient's precision."""
    assert ranks(2).run(_gradient_in_other_dtype, stage, dtype, False) == [expected] * 2
