"""Stage 3 under models of all kinds: the bits are those of stage 0."""

from __future__ import annotations

from functools import partial
from typing import Any

import inside
import partita
import pytest
import torch
import torch.nn.functional as F
from blocks_model import (
    TRANSPORTS,
    Block,
    assert_same_weights,
    assert_trains_as_stage_0,
    batch_of,
    config_for,
    error_of,
    make_blocks,
    take_step,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

through_both = pytest.mark.parametrize("path", TRANSPORTS)
AHEAD = [{}, {"stage3_max_live_parameters": 1}, {"stage3_prefetch_bucket_size": 0, "overlap_comm": False}]


def _set_order(orders: dict[Any, list[int]], engine: partita.Engine, step: int) -> None:
    engine.module.body.order = orders.get((step, engine.global_rank), orders.get(step, [0, 1, 2, 3]))  # type: ignore[union-attr]


def _orders_as_stage_0(orders: dict[Any, list[int]], transport: str) -> None:
    for zero in AHEAD:
        runs = []
        for stage in (0, 3):
            engine = partita.Engine(model=make_blocks(), config=config_for(stage, transport, zero=zero))
            for step in range(4):
                _set_order(orders, engine, step)
                take_step(engine, step)
                assert inside.gathered_bytes(engine) == 0
                engine.eval_batch(batch_of(50, engine.global_rank))
                assert inside.gathered_bytes(engine) == 0
            runs.append(engine.module_state_dict())
            engine.destroy()
        assert_same_weights(runs[1], runs[0], f"{orders} {zero}")


ORDERS: dict[str, dict[Any, list[int]]] = {
    "not as registered": {step: [2, 0, 3, 1] for step in range(4)},
    "another in every step": {0: [3, 2, 1, 0], 1: [1, 3, 0, 2], 2: [0, 1, 2, 3], 3: [2, 3, 0, 1]},
    "several times": {0: [0, 0, 1, 1], 1: [0, 1, 0, 1, 2, 3, 2], 2: [3, 3, 3], 3: [2, 1, 2, 1, 0]},
    "not at all": {0: [], 1: [1], 2: [3], 3: []},
    # Ranks that skip blocks, in the order of the others.
    "other ones on each rank": {
        (0, 0): [0, 1],
        (0, 1): [2, 3],
        (1, 0): [],
        (1, 1): [0, 1, 2, 3],
        (2, 0): [3],
        (2, 1): [0],
        (3, 0): [0, 3],
        (3, 1): [1, 2, 3],
    },
}


@through_both
@pytest.mark.parametrize("orders", ORDERS)
def test_blocks_run_in_any_order(ranks, orders, path):
    """G11: also several times, not at all, or not on every rank; nobody hangs."""
    ranks(2).run(_orders_as_stage_0, ORDERS[orders], path)


class Adapted(nn.Module):
    """A frozen block with a low-rank adapter beside it."""

    reentrant: bool | None = None

    def __init__(self, width: int, scale: nn.Parameter) -> None:
        super().__init__()
        self.frozen = Block(width, scale)
        self.down = nn.Linear(width, 2, bias=False)
        self.up = nn.Linear(2, width, bias=False)
        for p in (self.frozen.mix, self.frozen.back, self.frozen.norm):
            p.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None or not torch.is_grad_enabled():
            return self._run(x)
        return checkpoint(self._run, x, use_reentrant=self.reentrant)

    def _run(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.up(self.down(x))


class AroundBlocks(Block):
    """Called inside a checkpoint by whoever calls it."""

    reentrant = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.reentrant is None or not torch.is_grad_enabled():
            return super().__call__(*args, **kwargs)
        return checkpoint(super().__call__, *args, use_reentrant=self.reentrant, **kwargs)


def _make(block: Any, reentrant: bool | None, freeze: str = "", **sizes: int) -> nn.Module:
    model = make_blocks(block, **sizes)
    for i, child in enumerate(model.body.blocks):
        child.reentrant = reentrant  # type: ignore[assignment]
        if freeze == "first blocks" and i < 2:
            child.requires_grad_(False)
    model.body.scale.requires_grad_(True)
    if freeze:
        model.body.embed.requires_grad_(False)
        model.body.norm.requires_grad_(False)
    return model


@through_both
@pytest.mark.parametrize("reentrant", [True, False, None])
def test_checkpointed_and_frozen_blocks(ranks, reentrant, path):
    """G12, O6: checkpoints inside blocks and around them; adapters; blocks that are frozen as a whole."""
    for block in (Adapted, AroundBlocks):
        for freeze in ("", "first blocks"):
            if freeze and reentrant:
                continue  # torch: no input of a first reentrant checkpoint requires gradients
            make = partial(_make, block, reentrant, freeze)
            plain = partial(_make, block, None, freeze)
            ranks(2).run(assert_trains_as_stage_0, make, config_for(3, path), None, 2, plain)


def _frozen_memory(transport: str) -> tuple[int, int, int, int]:
    """Trained and frozen elements; states on this rank, frozen elements on this rank."""
    model = _make(Adapted, None, "embedding", width=40)  # several pages
    zero = {"reduce_bucket_size": 10**6}
    engine = partita.Engine(model=model, config=config_for(3, transport, zero=zero))
    take_step(engine, 0)
    for name, p in model.named_parameters():
        assert p.untyped_storage().nbytes() == 0, f"{name} has memory"
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    states = inside.state_numel(engine, "exp_avg")
    kept = sum(s.numel for flat in inside.frozen_units(engine) for s in flat.layout.slices(flat.own))
    return trained, frozen, states, kept


@through_both
def test_frozen_parameters_are_partitioned_and_have_no_states(ranks, path):
    """O6: both ranks together have every element once."""
    results = ranks(2).run(_frozen_memory, path)
    trained, frozen = results[0][:2]
    assert 0 < trained < frozen
    assert sum(r[2] for r in results) == trained
    assert sum(r[3] for r in results) == frozen
    assert all(r[3] < frozen for r in results)


class _Times(torch.autograd.Function):
    """x @ w.t(), with a weight that is saved by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, weight.t())
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, turned = ctx.saved_tensors
        assert torch.equal(weight.t(), turned)
        return grad @ weight, grad.flatten(0, -2).t() @ x.flatten(0, -2)


class Saving(Block):
    """Weights as views, slices, products with other weights, and in a Function of its own; a dict as output."""

    def forward(self, x: Tensor) -> Tensor:
        h = x @ self.mix.weight.t() + self.mix.bias.view(1, -1).expand(2, -1)[:1]
        first, second = self.back.weight.chunk(2, dim=1)
        h = torch.tanh(h)
        y = h[..., : first.shape[1]] @ first.t() + h[..., first.shape[1] :] @ second.t()
        y = _Times.apply(y, self.back.weight[:, :7] * self.norm.weight.detach())  # type: ignore[no-untyped-call]
        y = _Times.apply(y, self.mix.weight[:7])  # type: ignore[no-untyped-call]
        y = torch.einsum("bsi,oi->bso", y, self.back.weight[:, 8:])
        return x + F.layer_norm(y, (7,), self.norm.weight, self.norm.bias) * self.scale


class WrappedOutputs(Block):
    """A block whose output is a dict with a tuple in it."""

    def forward(self, x: Any) -> Any:
        x = x if isinstance(x, Tensor) else x["hidden"][0]
        return {"hidden": (super().forward(x), None)}


class Unwraps(nn.LayerNorm):
    """Takes such an output."""

    def forward(self, x: Any) -> Tensor:
        return super().forward(x["hidden"][0])


def _with_outputs() -> nn.Module:
    model = make_blocks(WrappedOutputs)
    model.body.norm = Unwraps(7)
    return model


@through_both
def test_what_is_saved_for_backward_is_valid_there(ranks, path):
    """Views, slices, a Function of the user's; outputs that are no tensors."""
    ranks(2).run(assert_trains_as_stage_0, partial(make_blocks, Saving), config_for(3, path))
    ranks(2).run(assert_trains_as_stage_0, _with_outputs, config_for(3, path))


class Forwarding(nn.Module):
    """A wrapper that has all attributes of what it wraps."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("wrapped"), name)

    def forward(self, *args: Any) -> Any:
        return self.wrapped(*args)


class HalfBlock(Block):
    """Its products are in bfloat16, its norm in float32."""

    def __init__(self, width: int, scale: nn.Parameter) -> None:
        super().__init__(width, scale)
        self.mix.bfloat16()
        self.back.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.back(F.gelu(self.mix(self.norm(x).bfloat16()))).float() * self.scale


def _wrapped() -> nn.Module:
    model = make_blocks(lambda width, scale: Forwarding(Block(width, scale)))
    model.body = Forwarding(model.body)  # type: ignore[assignment]
    return model


def _renamed_as_stage_0(make: Any, transport: str) -> None:
    runs = []
    for stage in (0, 3):
        engine = partita.Engine(model=make(), config=config_for(stage, transport))
        for step in range(3):
            take_step(engine, step)
        engine.eval_batch(batch_of(9, engine.global_rank))
        runs.append(engine.module_state_dict())
    assert_same_weights(runs[1], runs[0])


@through_both
def test_mixed_dtypes_and_wrappers(ranks, path):
    """S4: two dtypes in one block; modules that delegate attributes."""
    ranks(2).run(assert_trains_as_stage_0, partial(make_blocks, HalfBlock), config_for(3, path))
    ranks(2).run(_renamed_as_stage_0, _wrapped, path)


def _grown(transport: str) -> None:
    model = make_blocks()
    engine = partita.Engine(model=model, config=config_for(3, transport))
    take_step(engine, 0)
    model.body.blocks[1] = Forwarding(model.body.blocks[1])  # the same parameters
    model.body.blocks.append(Block(7, model.body.scale).requires_grad_(False))
    model.body.scale.requires_grad_(True)
    model.body.order = [0, 1, 2, 3, 4]
    take_step(engine, 1)
    weights = engine.module_state_dict()
    assert torch.equal(weights["body.blocks.4.mix.weight"], model.body.blocks[4].mix.weight)  # type: ignore[union-attr]
    model.body.blocks.append(Block(7, model.body.scale))
    engine.backward(engine(*batch_of(0, engine.global_rank)))
    assert "body.blocks.5.norm.weight' was added" in error_of(engine.step, RuntimeError)


@through_both
def test_modules_added_later_work_frozen_and_are_refused_by_name(ranks, path):
    """S4."""
    ranks(2).run(_grown, path)


class Writing(Block):
    """Changes a weight in forward when told to."""

    writes = False

    def forward(self, x: Tensor) -> Tensor:
        if self.writes:
            with torch.no_grad():
                self.back.bias.mul_(0.5)
        return super().forward(x)


def _written_in_forward(transport: str, frozen: bool) -> None:
    model = make_blocks(Writing)
    writing: Any = model.body.blocks[2]
    if frozen:
        writing.back.requires_grad_(False)
    engine = partita.Engine(model=model, config=config_for(3, transport))
    take_step(engine, 0)
    writing.writes = True
    loss = engine(*batch_of(1, engine.global_rank))
    writing.writes = False
    engine.backward(loss)
    assert "parameter 'body.blocks.2.back.bias' was written to" in error_of(engine.step, RuntimeError)


@pytest.mark.parametrize("frozen", [False, True])
@through_both
def test_a_write_in_forward_is_refused_by_name(ranks, path, frozen):
    """It would reach the shards of some ranks, or of none."""
    ranks(2).run(_written_in_forward, path, frozen)


class HandsOn(nn.Module):
    """A layer that may be left out: what comes in goes out."""

    def __init__(self, skips: bool) -> None:
        super().__init__()
        self.linear, self.skips = nn.Linear(9, 9), skips

    def forward(self, x: Tensor) -> Tensor:
        return x if self.skips else torch.tanh(self.linear(x))


def _hands_on(transport: str, stage: int, skipped: tuple[int, ...]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(*(HandsOn(i in skipped) for i in range(4)))
    engine, *_ = partita.initialize(model=model, config=config_for(stage, transport))
    for step in range(3):
        x = torch.ones(2, 9) * (step + engine.global_rank + 1)
        engine.backward(engine(x).square().mean())
        engine.step()
    weights = engine.module_state_dict()
    engine.destroy()
    return weights


@pytest.mark.parametrize("skipped", [(), (1, 2), (3,), (0, 3)])
@pytest.mark.parametrize("over", ["auto", "torch"])
def test_a_tensor_that_leaves_several_modules_brings_the_one_that_made_it(ranks, over, skipped):
    """The output of the last layer is that of the model; a layer that is left out hands on what the one before made."""
    for weights, expected in zip(
        ranks(2).run(_hands_on, over, 3, skipped), ranks(2).run(_hands_on, over, 0, skipped), strict=True
    ):
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
