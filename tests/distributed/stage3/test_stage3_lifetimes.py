"""Stage 3: parameters exist while they compute, on both ways that they come: mapped, and gathered block by block."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
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
    assert_trains_as_stage_0,
    batch_of,
    config_for,
    error_of,
    make_blocks,
    take_step,
)
from partita.zero import AbsentParameterError, GatheredParameters
from torch import Tensor, nn

through_both = pytest.mark.parametrize("path", TRANSPORTS)


def _used_outside(transport: str) -> None:
    model = make_blocks()
    engine = partita.Engine(model=model, config=config_for(3, transport))
    take_step(engine, 0)
    names = {p: name for name, p in model.named_parameters()}
    for parameter in (model.body.blocks[2].mix.weight, model.head.weight, model.body.scale):
        p, name = parameter, names[parameter]
        ones = torch.ones(p.shape)
        uses: list[Callable[[], Any]] = [
            lambda p=p: p + 1,
            lambda p=p: 1 - p,
            lambda p=p: p.sum(),
            lambda p=p: p.detach(),
            lambda p=p: p[0],
            lambda p=p: p.tolist(),
            lambda p=p: p.float().numpy(),
            lambda p=p: p.data,
            lambda p=p: p.data_ptr(),
            lambda p=p: list(p),
            lambda p=p: torch.cat([p.flatten(), p.flatten()]),
            lambda p=p: torch.stack([p]),
            lambda p=p: F.linear(torch.ones(1, p.shape[-1]), p),
            lambda p=p, ones=ones: torch.equal(ones, p),
            lambda p=p, ones=ones: ones.copy_(p),
            lambda p=p, ones=ones: p.copy_(ones),
            lambda p=p: p.zero_(),
            lambda p=p: nn.init.normal_(p),
            lambda p=p: p.__setitem__(0, 1.0),
            lambda p=p, ones=ones: setattr(p, "data", ones),
            lambda p=p: copy.deepcopy(p),
            lambda p=p: pickle.dumps(p),
            lambda p=p: nn.utils.parameters_to_vector([p]),
        ]
        with torch.no_grad():
            for i, use in enumerate(uses):
                assert name in error_of(use, AbsentParameterError), f"use {i} of {name}"
        assert name in repr(p)
        about = (p.shape, p.ndim, p.dtype, p.device, p.numel(), p.element_size(), p.stride(), len(p), p.is_leaf)
        assert about == (
            ones.shape,
            ones.ndim,
            ones.dtype,
            ones.device,
            ones.numel(),
            4,
            ones.stride(),
            len(ones),
            True,
        )
        assert isinstance(p, nn.Parameter) and p.requires_grad and p.grad is None and p in names
    for use in (model.state_dict, lambda: copy.deepcopy(model), lambda: model.half()):
        assert "parameter 'body." in error_of(use, AbsentParameterError)
    with torch.no_grad():
        assert "body.blocks.1.mix.weight" in error_of(
            lambda: model.load_state_dict({name: torch.ones(p.shape) for p, name in names.items()})
        )
        assert "blocks" in str(model)
        assert "mix.weight" in error_of(lambda: model.body.blocks[2].mix(torch.ones(7)), AbsentParameterError)
    take_step(engine, 1)
    engine.destroy()


@through_both
def test_a_parameter_used_outside_of_forward_raises_and_is_named(ranks, path):
    """S1: read, written, copied, pickled, assigned; what describes it can be asked, and training goes on."""
    ranks(2).run(_used_outside, path)


class Failing(Block):
    """Raises in forward or backward when told to."""

    fails = ""

    def forward(self, x: Tensor) -> Tensor:
        if self.fails == "forward":
            raise OSError("in forward")
        x = super().forward(x)
        if self.fails == "backward":
            x.register_hook(self._fail)
        return x

    def _fail(self, _grad: Tensor) -> None:
        raise OSError("in backward")


def _interrupt(engine: partita.Engine, step: int) -> None:
    """Another one of the things that programs do between steps."""
    model: Any = engine.module
    tokens, targets = batch_of(50 + step, engine.global_rank)
    failing = model.body.blocks[1]
    if step == 0:
        engine.eval_batch((tokens, targets))
    elif step == 1:
        with torch.no_grad():
            engine(tokens, targets)
    elif step == 2:
        engine.eval()
        for length in range(1, 6):  # an inner module by itself, as generate() of what the model wraps
            with torch.no_grad():
                model.body(tokens[:, :length])
            assert inside.gathered_bytes(engine) == 0
        with torch.inference_mode():
            model(tokens)
            model.body.blocks[2](torch.ones(1, 7))
        engine.train()
    elif step == 3:
        for call in (engine, model, model.body):
            for mode in (torch.enable_grad, torch.no_grad):
                failing.fails = "forward"
                with mode(), pytest.raises(OSError, match="in forward"):
                    call(tokens)
                failing.fails = ""
                engine.zero_grad()
                assert inside.gathered_bytes(engine) == 0
    elif step == 4:
        failing.fails = "backward"
        loss = engine(tokens, targets)
        failing.fails = ""
        with pytest.raises(OSError, match="in backward"):
            engine.backward(loss)
        engine.zero_grad()
    elif step == 5:
        engine(tokens, targets)  # nobody wants its gradients
        engine.zero_grad()
    assert inside.gathered_bytes(engine) == 0, f"between steps, {step}"


@through_both
def test_what_comes_between_steps_changes_nothing(ranks, path):
    """S2: eval, no_grad in train mode, generate, exceptions in forward and backward; nothing stays gathered."""
    config = config_for(3, path)
    ranks(2).run(assert_trains_as_stage_0, partial(make_blocks, Failing), config, _interrupt, 7)


def _forwards_inside_a_step(transport: str, stage: int) -> dict[str, Tensor]:
    """Forwards between a forward and its backward, two forwards before one backward, two backwards."""
    engine = partita.Engine(model=make_blocks(), config=config_for(stage, transport))
    for step in range(3):
        rank = engine.global_rank
        loss = engine(*batch_of(step, rank))
        with torch.no_grad():
            engine(*batch_of(20 + step, rank))
            engine.module.body(batch_of(30 + step, rank)[0])
        other = engine(*batch_of(40 + step, rank))
        if step == 1:
            engine.backward(loss)
            engine.eval_batch(batch_of(60, rank))
            engine.backward(other)
        else:
            engine.backward(loss + other, retain_graph=step == 2)
            if step == 2:
                engine.backward(loss)
        engine.step()
        assert inside.gathered_bytes(engine) == 0
    return engine.module_state_dict()


@through_both
def test_forwards_and_backwards_may_interleave(ranks, path):
    """S2: the same bits as in stage 0."""
    expected = ranks(2).run(_forwards_inside_a_step, path, 0)
    for weights, others in zip(ranks(2).run(_forwards_inside_a_step, path, 3), expected, strict=True):
        for name, value in others.items():
            assert torch.equal(weights[name], value), name


class Seen:
    """Which blocks have memory while each of them computes: {block: blocks}, in forward and in backward."""

    def __init__(self, engine: partita.Engine) -> None:
        self.forward: dict[int, set[int]] = {}
        self.backward: dict[int, set[int]] = {}
        self._blocks, self._root = inside.blocks(engine), inside.root(engine)
        for i, group in enumerate(self._blocks):
            group.module.mix.register_forward_hook(partial(self._compute, i))  # type: ignore[union-attr]

    def _compute(self, i: int, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self.forward[i] = self._here()
        output.register_hook(lambda _: self.backward.update({i: self._here()}))  # type: ignore[no-untyped-call]

    def _here(self) -> set[int]:
        assert all(unit.residence.gathered_bytes for unit in self._root.units), "the root is not there"
        return {i for i, g in enumerate(self._blocks) if any(unit.residence.gathered_bytes for unit in g.units)}


def _blocks_that_are_here(zero: dict[str, Any]) -> tuple[dict[int, set[int]], dict[int, set[int]], int]:
    engine = partita.Engine(model=make_blocks(blocks=5), config=config_for(3, "torch", zero=zero))
    seen = Seen(engine)
    for step in range(3):
        take_step(engine, step)
    sizes = {group.numel for group in inside.blocks(engine)}
    assert len(sizes) == 1
    return seen.forward, seen.backward, sizes.pop()


def test_only_the_block_that_computes_and_the_next_are_here(ranks):
    """Bounds: block, root and what is prefetched, in forward and backward; max_live_parameters forbids prefetching."""
    forward, backward, numel = ranks(2).run(_blocks_that_are_here, {"stage3_prefetch_bucket_size": 0})[0]
    assert forward == {0: {0, 1}, 1: {1, 2}, 2: {2, 3}, 3: {3, 4}, 4: {4}}
    assert backward == {4: {4, 3}, 3: {3, 2}, 2: {2, 1}, 1: {1, 0}, 0: {0}}
    forward, backward, _ = ranks(2).run(_blocks_that_are_here, {"stage3_prefetch_bucket_size": 2 * numel})[0]
    assert forward == {0: {0, 1, 2}, 1: {1, 2, 3}, 2: {2, 3, 4}, 3: {3, 4}, 4: {4}}
    assert backward == {4: {4, 3, 2}, 3: {3, 2, 1}, 2: {2, 1, 0}, 1: {1, 0}, 0: {0}}
    forward, backward, _ = ranks(2).run(
        _blocks_that_are_here, {"stage3_prefetch_bucket_size": 2 * numel, "stage3_max_live_parameters": 1}
    )[0]
    assert forward == backward == {i: {i} for i in range(5)}


def _persistent(threshold: int) -> None:
    """LayerNorms and `scale` have at most 7 elements, biases of `mix` 15."""
    model = make_blocks()
    zero = {"stage3_param_persistence_threshold": threshold}
    engine = partita.Engine(model=model, config=config_for(3, "torch", zero=zero))
    take_step(engine, 0)
    for name, p in model.named_parameters():
        if p.numel() <= threshold:
            assert p.sum().isfinite(), name
        else:
            assert name in error_of(p.sum, AbsentParameterError)
    engine.destroy()
    assert_trains_as_stage_0(make_blocks, config_for(3, "torch", zero=zero))


@pytest.mark.parametrize("threshold", [7, 15, 10_000])
def test_small_parameters_are_always_here(ranks, threshold):
    """Those of at most so many elements, and only they; the bits are those of stage 0."""
    ranks(2).run(_persistent, threshold)


def _blocks_of(config: dict[str, Any]) -> list[str]:
    engine = partita.Engine(model=make_blocks(), config=config)
    names = [type(group.module).__name__ for group in inside.blocks(engine)]
    engine.destroy()
    return names


def test_unit_classes_name_the_blocks(ranks):
    """Instead of the repeated children; an unknown class is refused with those that there are."""
    for classes, blocks in (
        (None, ["Block"] * 4),
        (["Block"], ["Block"] * 4),
        (["Body"], ["Body"]),
        (["Linear", "LayerNorm"], ["LayerNorm", "Linear", "Linear"] * 4 + ["LayerNorm"]),
    ):
        config = config_for(3, "torch", zero={"unit_classes": classes})
        assert ranks(2).run(_blocks_of, config) == [blocks] * 2, classes
        ranks(2).run(assert_trains_as_stage_0, make_blocks, config)
    for path in TRANSPORTS:
        config = config_for(3, path, zero={"unit_classes": ["Block", "Blokc"]})
        for error in ranks(2).run(_error_of_engine, make_blocks, config):
            assert "'Blokc'" in error and "Block, " in error and "Embedding" in error


def _error_of_engine(make: Callable[[], nn.Module], config: dict[str, Any]) -> str:
    return error_of(lambda: partita.Engine(model=make(), config=config), ValueError)


def _compiled(part: str) -> nn.Module:
    model = make_blocks()
    if part == "model":
        return torch.compile(model)  # type: ignore[return-value]
    model.body.blocks[1].compile()
    return model


@through_both
def test_a_compiled_model_is_refused_by_name(ranks, path):
    """F8: the whole of it or a part."""
    for part, name in (("model", "OptimizedModule"), ("a block", "'body.blocks.1'")):
        for error in ranks(2).run(_error_of_engine, partial(_compiled, part), config_for(3, path)):
            assert name in error and "torch.compile" in error


def _on_one_rank() -> None:
    assert_trains_as_stage_0(partial(make_blocks, Failing), config_for(3, "auto"), _interrupt, 7)
    model = make_blocks()
    engine = partita.Engine(model=model, config=config_for(3, "auto"))
    with GatheredParameters(model.parameters(), modifier_rank=0), torch.no_grad():
        model.body.scale.fill_(0.5)
    assert engine.module_state_dict()["body.scale"] == 0.5
    assert copy.deepcopy(model).body.scale == 0.5  # nothing is absent


def test_one_rank_works(ranks):
    """It has all parameters, all the time."""
    ranks(1).run(_on_one_rank)


def _pickled(stage: int) -> None:
    model = make_blocks()
    engine = partita.Engine(model=model, config=config_for(stage, "auto"))
    take_step(engine, 0)
    state = pickle.loads(pickle.dumps(model.state_dict(keep_vars=True)))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    other = partita.Engine(model=pickle.loads(pickle.dumps(make_blocks())), config=config_for(stage, "auto"))
    other.load_module_state_dict(state)
    take_step(other, 1)


def test_parameters_can_be_pickled_where_they_are_here(ranks):
    """What holds them is not pickled with them."""
    ranks(1).run(_pickled, 3)
    ranks(2).run(_pickled, 1)
