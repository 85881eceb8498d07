"""Optimizer states and stage 3's shards on the host: the same training, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import inside
import partita
import pytest
import torch
from dictated import Dictated, dictate
from offloaded import (
    CHANGES,
    OFFLOADS,
    PATTERN,
    PRECISIONS,
    TRANSPORTS,
    assert_same,
    gradients,
    offloading,
    one_backward,
    resident,
    seen_in,
    state_of,
    three_backwards,
)
from partita.utils import (
    safe_get_full_grad,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
)
from partita.zero import GatheredParameters


def _trains_as_resident(config: dict[str, Any], backward: Callable[..., None] = one_backward) -> None:
    rows, state = seen_in(config, backward)
    expected_rows, expected = seen_in(resident(config), backward)
    for (norm, *row), (expected_norm, *expected_row) in zip(rows, expected_rows, strict=True):
        assert row == expected_row
        torch.testing.assert_close(norm, expected_norm, rtol=1e-12, atol=0, equal_nan=True)
    assert rows[-1][1] == PATTERN.count("x")
    assert_same(state, expected)


# -- the same training


@pytest.mark.pairwise
@pytest.mark.parametrize("over", TRANSPORTS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("offload", OFFLOADS)
def test_an_offloaded_run_has_the_bits_of_a_resident_one(ranks, offload, precision, over):
    """Weights, masters, moments, skips, scale, norms; two steps overflow."""
    ranks(2).run(_trains_as_resident, offloading(offload, precision, over=over))


@pytest.mark.parametrize("change", [change for change in CHANGES if change != "plain"])
@pytest.mark.parametrize(
    ("offload", "precision", "over"),
    [
        ("1", "fp16", "torch"),
        ("2, some", "bf16", "auto"),
        ("3", "fp32", "auto"),
        ("3, parameters too", "bf16", "torch"),
    ],
)
def test_accumulation_clipping_and_other_optimizers_change_nothing_of_that(ranks, offload, precision, over, change):
    ranks(2).run(_trains_as_resident, offloading(offload, precision, change, over))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("offload", ["1", "2", "3", "3, parameters too"])
def test_one_rank_offloads_too(ranks, offload, precision):
    ranks(1).run(_trains_as_resident, offloading(offload, precision, "clipping"))


@pytest.mark.parametrize("change", ["plain", "accumulation"])
@pytest.mark.parametrize(
    ("offload", "over"), [("1", "torch"), ("2", "auto"), ("3", "auto"), ("3, parameters too", "torch")]
)
def test_several_backwards_before_a_step_all_count(ranks, offload, over, change):
    """G5"""
    ranks(2).run(_trains_as_resident, offloading(offload, "bf16", change, over), three_backwards)


# -- weights from outside


def _written(config: dict[str, Any], how: str) -> None:
    states = []
    for each in (config, resident(config)):
        engine = partita.Engine(model=Dictated(), config=each)
        one_backward(engine, 0, bad=False)
        engine.step()
        other = Dictated(seed=5).state_dict()
        if how == "load":
            engine.load_module_state_dict(other if engine.global_rank == 0 else {})
        elif how == "gathered":
            written = [engine.module.a, engine.module.e]
            with torch.no_grad(), GatheredParameters(written, modifier_rank=engine.world_size - 1):
                if engine.global_rank == engine.world_size - 1:
                    engine.module.a.mul_(-3)
                    engine.module.e[::7] = 1.5
        else:
            with torch.no_grad():
                engine.module.e[::7] = 1.5  # the same on every rank
        now = state_of(engine)
        if how == "load":
            for name, value in other.items():
                assert torch.equal(now[name], value.to(now[name].dtype)), name
                # one that is its master rounded by chance keeps the master
                assert torch.equal(now[f"master of {name}"].to(now[name].dtype), now[name]), name
        else:
            assert torch.equal(now["e"][::7], torch.full_like(now["e"][::7], 1.5))
        one_backward(engine, 1, bad=False)
        engine.step()
        after = state_of(engine)
        assert not torch.equal(after["e"], now["e"])
        states.append({**{f"{k}, before the step": v for k, v in now.items()}, **after})
        engine.destroy()
    assert_same(states[0], states[1], how)


@pytest.mark.pairwise
@pytest.mark.parametrize("precision", ["fp32", "bf16", "split"])
@pytest.mark.parametrize(
    ("offload", "over", "how"),
    [
        (offload, over, how)
        for offload, over in [("1", "auto"), ("2", "torch"), ("3", "auto"), ("3, parameters too", "torch")]
        for how in ("load", "gathered", "in place")
        if how != "in place" or offload in "12"
    ],
)
def test_written_weights_reach_the_masters_on_the_host(ranks, offload, over, how, precision):
    """O3"""
    ranks(2).run(_written, offloading(offload, precision, over=over), how)


def _safe_functions(config: dict[str, Any]) -> None:
    states = []
    for each in (config, resident(config)):
        engine = partita.Engine(model=Dictated(), config=each)
        one_backward(engine, 0, bad=False)
        engine.step()
        one_backward(engine, 1, bad=False)
        e, a = engine.module.e, engine.module.a
        seen = {"grad": safe_get_full_grad(e)}
        torch.testing.assert_close(seen["grad"], dictate(1)["e"], rtol=0, atol=0)
        safe_set_full_grad(e, torch.full(e.shape, 0.25))
        safe_set_full_fp32_param(e, torch.linspace(-1, 1, e.numel()))
        safe_set_full_optimizer_state(e, torch.full(e.shape, 0.5), "exp_avg")
        safe_set_full_fp32_param(a, torch.full(a.shape, 1 / 3))
        seen |= {"grad after": safe_get_full_grad(e), **{f"{k}, set": v for k, v in state_of(engine).items()}}
        assert torch.equal(seen["grad after"], torch.full(e.shape, 0.25))
        assert torch.equal(seen["master of e, set"], torch.linspace(-1, 1, e.numel()))
        assert torch.equal(seen["exp_avg of e, set"], torch.full(e.shape, 0.5))
        assert torch.equal(seen["a, set"], torch.full(a.shape, 1 / 3).to(a.dtype))
        engine.step()
        states.append({**seen, **state_of(engine)})
        engine.destroy()
    assert_same(states[0], states[1])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "split"])
@pytest.mark.parametrize(
    ("offload", "over"), [("1", "torch"), ("2, some", "auto"), ("3", "auto"), ("3, parameters too", "torch")]
)
def test_what_is_on_the_host_is_read_and_written_whole(ranks, offload, over, precision):
    ranks(2).run(_safe_functions, offloading(offload, precision, over=over))


# -- skips


def _skips(config: dict[str, Any], maker: int, element: int) -> None:
    engine = partita.Engine(model=Dictated(), config=config)
    one_backward(engine, 0, bad=False)
    engine.step()
    before, step = state_of(engine), inside.last_control(engine).step
    grads = gradients(engine, 1)
    if engine.global_rank == maker:
        grads["e"][element] = float("nan")
    engine.backward(engine(grads))
    engine.step()
    assert engine.skipped_steps == 1
    assert inside.last_control(engine).step == step
    assert_same(state_of(engine), before, "after the skip")
    one_backward(engine, 2, bad=False)
    engine.step()
    assert engine.skipped_steps == 1
    assert not torch.equal(state_of(engine)["e"], before["e"])
    engine.destroy()


@pytest.mark.pairwise
@pytest.mark.parametrize("change", ["plain", "torch optimizer"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("offload", "over"), [("1", "torch"), ("2, some", "auto"), ("3", "auto"), ("3, parameters too", "torch")]
)
def test_nan_in_one_ranks_shard_is_a_step_that_nobody_takes(ranks, offload, over, precision, change):
    """N1: whoever makes it, whoever owns it; nothing changes, on the host and on the device."""
    for maker, element in [(0, 0), (0, -1), (1, 0), (1, -1)]:
        ranks(2).run(_skips, offloading(offload, precision, change, over), maker, element)
