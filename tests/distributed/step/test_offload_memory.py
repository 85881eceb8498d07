"""Offloading: which buffers are on the host, and how much of the model.

The device is the CPU here, so what is on the host is told by who allocated it.
"""

from __future__ import annotations

from typing import Any

import inside
import partita
import pytest
from dictated import Dictated
from offloaded import (
    CPU,
    OFFLOADS,
    TRANSPORTS,
    offloading,
)
from partita.units import Gathered
from torch import Tensor


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
        shard_is_there = zero.offload_param.device == "cpu" and isinstance(unit.residence, Gathered)
        assert lies_in(unit.own_params, host) == shard_is_there
        assert (unit.updated is not unit.own_params) == unit.offloads  # where the host is no device, it has no copy
        assert lies_in(unit.updated, host) == unit.offloads
        if unit.full_grads is not None:
            shared = unit.reduced.untyped_storage()._cdata == unit.full_grads.untyped_storage()._cdata
            assert shared != unit.offloads
    by_unit = (5 if engine.config.bf16.enabled else 4) + (isinstance(unit.residence, Gathered) and shard_is_there)
    spare = 1 if engine.config.bf16.master_weights == "split" else 0  # whole masters, while it is built
    assert len(host) == (by_unit + spare) * len(offloaded)
    if not everything:
        numel = [sum(p.numel() for p in unit.parameters) for unit in inside.units(engine)]
        on_host = sum(n for n, unit in zip(numel, inside.units(engine), strict=True) if unit.offloads)
        assert abs(on_host - zero.offload_optimizer.ratio * sum(numel)) <= max(numel) / 2
    engine.destroy()


@pytest.mark.pairwise
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
