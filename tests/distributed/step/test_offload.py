"""Optimizer states and stage 3's shards on the host: the same training, bit for bit, and where the bytes are.

The device is the CPU here, so what is on the host is told by who allocated it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import inside
import partita
import pytest
import torch
from dictated import SPLIT, Dictated, config_for, dictate, share
from late_streams import LateStreams, on_late_streams
from partita.units import Lifetime
from partita.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
)
from partita.zero import GatheredParameters
from torch import Tensor, nn

TRANSPORTS = ("auto", "torch")
ADAM: dict[str, Any] = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}}
SGD: dict[str, Any] = {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}}
CPU: dict[str, Any] = {"device": "cpu"}
# name -> (stage, what is offloaded)
OFFLOADS: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {"offload_optimizer": CPU}),
    "2": (2, {"offload_optimizer": CPU}),
    "3": (3, {"offload_optimizer": CPU}),
    "3, parameters too": (3, {"offload_optimizer": CPU, "offload_param": CPU}),
    "1, nothing": (1, {"offload_optimizer": {**CPU, "ratio": 0}}),
    "2, some": (2, {"offload_optimizer": {**CPU, "ratio": 0.3}}),
    "3, some, not pinned": (3, {"offload_optimizer": {**CPU, "ratio": 0.6, "pin_memory": False}}),
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "split": SPLIT,
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8, "hysteresis": 1, "loss_scale_window": 2}},
}
CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "clipping": {"gradient_clipping": 0.5},
    "torch optimizer": {"optimizer": SGD},
    "torch optimizer, accumulation, clipping": {
        "optimizer": SGD,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
    },
    "fp32 sums": {"gradient_accumulation_steps": 3, "data_types": {"grad_accum_dtype": "fp32"}},
    "16-bit traffic": {"communication_data_type": "bf16"},
    "not overlapped": {"overlap_comm": False},
}
PATTERN = "..x.x.."  # x: gradients overflow


def offloading(offload: str, precision: str = "fp32", change: str = "plain", over: str = "auto") -> dict[str, Any]:
    stage, zero = OFFLOADS[offload]
    changes = dict(CHANGES[change])
    overlap = changes.pop("overlap_comm", True)
    config = config_for(stage, **{"optimizer": ADAM, **PRECISIONS[precision], **changes})
    config["zero_optimization"] |= {**zero, "overlap_comm": overlap}
    config["comm"] = {"transport": over, "timeout_seconds": 20}
    return config


def resident(config: dict[str, Any]) -> dict[str, Any]:
    zero = {k: v for k, v in config["zero_optimization"].items() if not k.startswith("offload")}
    return {**config, "zero_optimization": zero}


def gradients(engine: partita.Engine, step: int, *, bad: bool = False) -> dict[str, Tensor]:
    """This rank's. Bad: one element of `e` is too large for any format; it lies in the last rank's shard."""
    grads = share(dictate(step), engine.global_rank, engine.world_size)
    if bad and engine.global_rank == 0:
        grads["e"][-1] = float("inf")
    return grads


def one_backward(engine: partita.Engine, step: int, *, bad: bool) -> None:
    engine.backward(engine(gradients(engine, step, bad=bad)))


def three_backwards(engine: partita.Engine, step: int, *, bad: bool) -> None:
    for i in range(3):
        engine.backward(engine(gradients(engine, 10 * step + i, bad=bad and i == 1)))


def state_of(engine: partita.Engine) -> dict[str, Tensor]:
    """Weights, masters and moments by name, whole. A collective."""
    found = dict(engine.module_state_dict())
    for name, parameter in engine.module.named_parameters():
        found[f"master of {name}"] = safe_get_full_fp32_param(parameter)
        for key in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            state = safe_get_full_optimizer_state(parameter, key)
            if state is not None:
                found[f"{key} of {name}"] = state
    return found


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16 if tensor.itemsize == 2 else torch.int32)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], where: str = "") -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(bits(actual[name]), bits(value)), f"{name} {where}: {(actual[name] - value).abs().max()}"


def seen_in(
    config: dict[str, Any],
    backward: Callable[..., None] = one_backward,
    pattern: str = PATTERN,
    model: Callable[[], nn.Module] = Dictated,
    prepare: Callable[[partita.Engine], Any] | None = None,
) -> tuple[list[Any], dict[str, Tensor]]:
    """Per step what the engine tells, and the state at the end."""
    engine = partita.Engine(model=model(), config=config)
    if prepare is not None:
        prepare(engine)
    rows = []
    for step, event in enumerate(pattern):
        for i in range(engine.gradient_accumulation_steps()):
            backward(engine, 100 * step + 10 * i, bad=event == "x" and i == 0)
            engine.step()
        rows.append((engine.get_global_grad_norm(), engine.skipped_steps, engine.loss_scale, engine.get_lr()))
    state = state_of(engine)
    engine.destroy()
    return rows, state


def _trains_as_resident(config: dict[str, Any], backward: Callable[..., None] = one_backward) -> None:
    rows, state = seen_in(config, backward)
    expected_rows, expected = seen_in(resident(config), backward)
    for (norm, *row), (expected_norm, *expected_row) in zip(rows, expected_rows, strict=True):
        assert row == expected_row
        torch.testing.assert_close(norm, expected_norm, rtol=1e-12, atol=0, equal_nan=True)
    assert rows[-1][1] == PATTERN.count("x")
    assert_same(state, expected)


# -- the same training


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


# -- where the bytes are


def lies_in(tensor: Tensor, buffers: list[Tensor]) -> bool:
    storages = {buffer.untyped_storage()._cdata for buffer in buffers}
    return tensor.numel() == 0 or tensor.untyped_storage()._cdata in storages


def _bytes_of(config: dict[str, Any]) -> None:
    with inside.noting_host_buffers() as host:
        engine = partita.Engine(model=Dictated(), config=config)
    zero = engine.config.zero_optimization
    everything = zero.offload_optimizer.ratio == 1
    offloaded = [unit for unit in inside.units(engine) if unit.offloads]
    assert offloaded
    assert (len(offloaded) == len(inside.units(engine))) == everything
    for unit, moments in zip(inside.units(engine), inside.moments(engine), strict=True):
        assert len(moments) == 2
        states = [t for t in (unit.master, unit.remainder, unit.reduced, *moments.values()) if t is not None]
        if not len(unit.own):
            continue
        assert [lies_in(t, host) for t in states] == [unit.offloads] * len(states), unit.layout.slots
        assert all(t.numel() == len(unit.own) for t in states)
        shard_is_there = zero.offload_param.device == "cpu" and unit.lifetime is Lifetime.GATHERED
        assert lies_in(unit.own_params, host) == shard_is_there
        assert (unit.updated is not unit.own_params) == unit.offloads  # where the host is no device, it has no copy
        assert lies_in(unit.updated, host) == unit.offloads
        if unit.full_grads is not None:
            shared = unit.reduced.untyped_storage()._cdata == unit.full_grads.untyped_storage()._cdata
            assert shared != unit.offloads
    by_unit = (5 if engine.config.bf16.enabled else 4) + (unit.lifetime is Lifetime.GATHERED and shard_is_there)
    spare = 1 if engine.config.bf16.master_weights == "split" else 0  # whole masters, while it is built
    assert len(host) == (by_unit + spare) * len(offloaded)
    if not everything:
        numel = [sum(p.numel() for p in unit.parameters) for unit in inside.units(engine)]
        on_host = sum(n for n, unit in zip(numel, inside.units(engine), strict=True) if unit.offloads)
        assert abs(on_host - zero.offload_optimizer.ratio * sum(numel)) <= max(numel) / 2
    engine.destroy()


@pytest.mark.parametrize("over", TRANSPORTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "split"])
@pytest.mark.parametrize("offload", [name for name in OFFLOADS if "nothing" not in name])
def test_nothing_of_an_offloaded_unit_is_in_device_memory(ranks, offload, precision, over):
    """Masters, moments and reduced gradients; the shards too where they are asked for. Only what is counted here."""
    ranks(2).run(_bytes_of, offloading(offload, precision, over=over))


def _offloaded_share(ratio: float, sizes: list[int]) -> float:
    shapes = {f"p{i}": (size,) for i, size in enumerate(sizes)}
    config = offloading("1")
    config["zero_optimization"]["offload_optimizer"] = {**CPU, "ratio": ratio}
    engine = partita.Engine(model=Dictated(shapes), config=config)
    share = [unit.offloads for unit in inside.units(engine)]
    if len(set(sizes)) == 1:
        assert share == sorted(share, reverse=True)  # what is reduced first has the longest time to travel
    numel = sum(p.numel() for unit in inside.units(engine) if unit.offloads for p in unit.parameters)
    engine.destroy()
    return numel / sum(sizes)


@pytest.mark.parametrize(
    ("ratio", "expected"), [(0.0, 0.0), (0.01, 0.0), (0.3, 0.3), (0.5, 0.5), (0.99, 1.0), (1.0, 1.0)]
)
def test_the_ratio_is_the_share_of_the_elements(ranks, ratio, expected):
    assert ranks(1).run(_offloaded_share, ratio, [40] * 20) == [expected]


def test_a_unit_above_the_ratio_stays_and_smaller_ones_go(ranks):
    """The last parameter is reduced first, and is half of the model."""
    assert ranks(1).run(_offloaded_share, 0.2, [100] * 10 + [1000]) == [0.2]


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


@pytest.mark.parametrize("change", ["plain", "torch optimizer"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("offload", "over"), [("1", "torch"), ("2, some", "auto"), ("3", "auto"), ("3, parameters too", "torch")]
)
def test_nan_in_one_ranks_shard_is_a_step_that_nobody_takes(ranks, offload, over, precision, change):
    """N1: whoever makes it, whoever owns it; nothing changes, on the host and on the device."""
    for maker, element in [(0, 0), (0, -1), (1, 0), (1, -1)]:
        ranks(2).run(_skips, offloading(offload, precision, change, over), maker, element)


# -- a device whose copies take time


class OnHost(Tensor):
    """Memory that is not the device's, as its `device` says."""

    device = torch.device("cpu", 0)  # type: ignore[assignment]


class ApartStreams(LateStreams):
    """The host has memory of its own."""

    def copy_to_host(self, tensor: Tensor) -> Any:
        copy = super().copy_to_host(tensor)
        if tensor.is_floating_point():  # gradients
            copy._bytes = copy._bytes.as_subclass(OnHost)
        return copy


def _set_apart(engine: partita.Engine) -> None:
    """From now on, what gradients and shards are copied to and from is on another device."""
    for unit in inside.units(engine):
        if unit.offloads:
            unit.reduced = unit.reduced.as_subclass(OnHost)
            if engine.config.zero_optimization.offload_param.device == "cpu" and unit.lifetime is Lifetime.GATHERED:
                unit.own_params = unit.own_params.as_subclass(OnHost)
    inside.streams(engine).waits()


def _late(config: dict[str, Any], backward: Callable[..., None], apart: bool) -> list[tuple[int, int]]:
    """Copies and waits of the late run, whose bits are those of the usual one."""
    expected_rows, expected = seen_in(config, backward)
    with on_late_streams(ApartStreams() if apart else LateStreams()) as streams:
        rows, state = seen_in(config, backward, prepare=_set_apart if apart else None)
    assert repr(rows) == repr(expected_rows)
    assert_same(state, expected)
    return [(streams.copies, len({event for event in streams.events if event[0] == "wait"}))]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("backward", [one_backward, three_backwards])
@pytest.mark.parametrize("change", ["plain", "accumulation", "fp32 sums", "16-bit traffic", "torch optimizer"])
@pytest.mark.parametrize(
    ("offload", "over"), [("1", "auto"), ("2", "torch"), ("2, some", "auto"), ("3, parameters too", "torch")]
)
def test_gradients_that_arrive_late_are_read_when_they_have_arrived(ranks, offload, over, change, backward, apart):
    """G1, for the way to the host: what is on its way is garbage until somebody waits."""
    ranks(2).run(_late, offloading(offload, "bf16", change, over), backward, apart)


def _order(config: dict[str, Any]) -> list[Any]:
    """For the second step: what happened before step(), and in it until the norm was summed."""
    with on_late_streams(ApartStreams()) as streams:
        engine = partita.Engine(model=Dictated(), config=config)
        _set_apart(engine)
        one_backward(engine, 0, bad=False)
        engine.step()
        first = streams.copies
        streams.events.clear()
        one_backward(engine, 1, bad=False)
        in_backward = [event for event in streams.events if event[0] in ("copy", "wait")]
        streams.events.clear()
        with inside.watching_step(engine, lambda: streams.events.append(("run",))):
            engine.step()
        events = [event for event in streams.events if event[0] in ("copy", "wait", "run")]
        before_run = events[: events.index(("run",))]
        engine.destroy()
    return [first, in_backward, before_run]


@pytest.mark.parametrize("stage", [1, 2])
def test_backward_starts_copies_and_waits_for_none(ranks, stage):
    """Each unit's gradients are under way once, and all of them have arrived when the step begins to compute."""
    for first, in_backward, before_run in ranks(2).run(_order, offloading(str(stage))):
        assert all(number > first for kind, number in in_backward), "waits in backward"
        assert not [event for event in in_backward if event[0] == "wait"]
        copied = {event[1] for event in [*in_backward, *before_run] if event[0] == "copy"}
        waited = {event[1] for event in before_run if event[0] == "wait"}
        assert copied
        assert copied <= waited
