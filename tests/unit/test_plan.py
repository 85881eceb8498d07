"""units/plan.py: how parameters are cut into units, over arbitrary models and numbers of ranks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from partita.comm import SingleProcess
from partita.device import HostStreams
from partita.units import Lifetime, Offload, ParameterInfo, UnitSettings, build_units, make_layout, stage_policy
from partita.units.plan import PlanSettings, UnitPlan, plan_frozen, plan_trained
from torch import Tensor, nn

KINDS = {"float32": 4, "bfloat16": 2}
LIFETIMES = st.sampled_from(Lifetime)

arithmetic = settings(max_examples=100, deadline=None)


@st.composite
def models(draw: st.DrawFn) -> list[ParameterInfo]:
    """Parameters of two kinds, in up to three blocks and outside of them; some are empty."""
    infos = []
    for i, shape in enumerate(draw(st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), max_size=14))):
        kind = draw(st.sampled_from(sorted(KINDS)))
        block = draw(st.sampled_from([None, 0, 1, 2]))
        infos.append(ParameterInfo(f"p{i}", shape, draw(st.integers(0, 2)), KINDS[kind], kind, block))
    return infos


@st.composite
def plan_settings(draw: st.DrawFn) -> PlanSettings:
    """World sizes that divide nothing, buckets below and above the parameters."""
    return PlanSettings(
        world_size=draw(st.sampled_from([1, 2, 3, 5, 7, 13])),
        lifetime=draw(LIFETIMES),
        bucket_numel=draw(st.integers(1, 2000)),
        persistent_numel=draw(st.sampled_from([0, 1, 30, 10**6])),
        offload_share=draw(st.sampled_from([0.0, 0.3, 0.5, 1.0])),
        shard_multiples=draw(st.sampled_from([{}, {2: 2048, 4: 1024}])),
    )


def numel_of(infos: list[ParameterInfo], plan: UnitPlan) -> int:
    return sum(infos[i].numel for i in plan.indices)


@arithmetic
@given(models(), plan_settings())
def test_every_trained_parameter_is_in_exactly_one_plan(infos, given_settings):
    plans = plan_trained(infos, given_settings)
    assert sorted(i for plan in plans for i in plan.indices) == list(range(len(infos)))
    assert all(plan.indices for plan in plans)


@arithmetic
@given(models(), plan_settings())
def test_a_plan_says_of_its_parameters_what_is_true(infos, given_settings):
    """Layouts lay out the named parameters in their order; kinds, and with them element sizes, are never mixed."""
    for plan in plan_trained(infos, given_settings):
        members = [infos[i] for i in plan.indices]
        assert {(plan.kind, plan.element_bytes)} == {(info.kind, info.element_bytes) for info in members}
        multiple = given_settings.shard_multiples.get(plan.element_bytes, 1)
        assert plan.layout == make_layout(members, given_settings.world_size, multiple)
        assert plan.layout.shard_numel % multiple == 0
        assert plan.layout.world_size == given_settings.world_size
        assert plan.parameter_numel == numel_of(infos, plan)


@arithmetic
@given(models(), plan_settings())
def test_a_unit_is_within_the_bucket_or_has_one_large_parameter(infos, given_settings):
    for plan in plan_trained(infos, given_settings):
        sizes = [infos[i].numel for i in plan.indices if infos[i].numel]
        assert sum(sizes) <= given_settings.bucket_numel or len(sizes) == 1


@arithmetic
@given(models(), plan_settings())
def test_gathered_units_belong_to_one_block_and_small_parameters_are_always_there(infos, given_settings):
    """The persistence threshold is inclusive; whatever lives otherwise follows no block."""
    for plan in plan_trained(infos, given_settings):
        members = [infos[i] for i in plan.indices]
        if given_settings.lifetime is not Lifetime.GATHERED:
            assert (plan.lifetime, plan.block) == (given_settings.lifetime, None)
        elif plan.lifetime is Lifetime.ALWAYS:
            assert plan.block is None
            assert all(info.numel <= given_settings.persistent_numel for info in members)
        else:
            assert plan.lifetime is Lifetime.GATHERED
            assert {info.block for info in members} == {plan.block}
            assert all(info.numel > given_settings.persistent_numel for info in members)


@arithmetic
@given(models(), plan_settings())
def test_plans_are_in_the_order_in_which_backward_completes_them(infos, given_settings):
    """The last block first, then the root, then what is persistent; among these, the last registered first."""
    last = len(infos) + 1  # after all blocks

    def turn(plan: UnitPlan) -> int:
        if given_settings.lifetime is Lifetime.GATHERED and plan.lifetime is Lifetime.ALWAYS:
            return last + 1
        return last if plan.block is None else -plan.block

    plans = plan_trained(infos, given_settings)
    assert all(turn(a) <= turn(b) for a, b in pairwise(plans))
    for place in {(turn(plan), plan.kind) for plan in plans}:
        order = [i for plan in plans if (turn(plan), plan.kind) == place for i in plan.indices]
        assert order == sorted(order, reverse=True)


@arithmetic
@given(models(), plan_settings())
def test_the_offloaded_units_are_the_first_and_have_the_share_to_half_a_unit(infos, given_settings):
    plans = plan_trained(infos, given_settings)
    sizes = [numel_of(infos, plan) for plan in plans]
    on_host = sum(n for n, plan in zip(sizes, plans, strict=True) if plan.offloads)
    share = given_settings.offload_share
    assert abs(on_host - share * sum(sizes)) <= max(sizes, default=0) / 2
    if share == 0:
        assert not any(plan.offloads for plan in plans)
    if share == 1:
        assert all(plan.offloads for plan in plans)


@arithmetic
@given(models(), plan_settings())
def test_frozen_parameters_are_planned_where_they_come_and_go(infos, given_settings):
    """As the trained ones, without states to offload; those that are always there are in no unit."""
    resident = replace(given_settings, offload_share=0.0)
    expected = [plan for plan in plan_trained(infos, resident) if plan.lifetime is not Lifetime.ALWAYS]
    assert plan_frozen(infos, given_settings) == expected


def test_the_share_is_filled_from_the_unit_that_backward_completes_first():
    infos = [ParameterInfo(name, (10,), 0, 4, "float32") for name in "abcd"]
    cut = PlanSettings(world_size=2, lifetime=Lifetime.ALWAYS, bucket_numel=10, offload_share=0.5)
    plans = plan_trained(infos, cut)
    assert [(plan.indices, plan.offloads) for plan in plans] == [
        ((3,), True),
        ((2,), True),
        ((1,), False),
        ((0,), False),
    ]


@pytest.mark.parametrize(
    ("stage", "world_size", "shares_memory", "offloads_params", "expected"),
    [
        (0, 4, True, False, Lifetime.ALWAYS),
        (2, 4, False, False, Lifetime.ALWAYS),
        (3, 1, False, False, Lifetime.ALWAYS),
        (3, 1, False, True, Lifetime.GATHERED),
        (3, 4, True, False, Lifetime.MAPPED),
        (3, 4, False, False, Lifetime.GATHERED),
    ],
)
def test_lifetimes_by_stage_and_ranks(stage, world_size, shares_memory, offloads_params, expected):
    lifetime = stage_policy(stage).lifetime(
        world_size=world_size, shares_memory=shares_memory, offloads_params=offloads_params
    )
    assert lifetime is expected


# -- as they are built


class TwoRanks(SingleProcess):
    """Rank 0 of two, the other of which agrees with everything."""

    world_size = 2


class OnOneHost(TwoRanks):
    """They share memory, in pages of 4 KiB."""

    shares_memory = True

    def mapped(self, numel: int, dtype: torch.dtype) -> Tensor | None:
        return torch.zeros(numel, dtype=dtype)

    def mapped_multiple(self, dtype: torch.dtype) -> int:
        return 4096 // dtype.itemsize


def small_model() -> nn.Module:
    blocks = [nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 5)) for _ in range(3)]
    model = nn.Sequential(nn.Linear(3, 5), nn.ModuleList(blocks), nn.Linear(5, 2))
    model[0].weight.requires_grad_(False)
    blocks[1][0].requires_grad_(False)
    return model


@pytest.mark.parametrize("world", [SingleProcess, TwoRanks, OnOneHost])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("persistent_numel", [0, 7])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_units_are_built_as_planned(stage, persistent_numel, share, world):
    """The same layouts, lifetimes, offload and blocks, from names and shapes alone."""
    offload = Offload(states=share, params=stage == 3 and share == 1)
    model, communicator, policy = small_model(), world(), stage_policy(stage)
    named = list(model.named_parameters())
    lifetime = policy.lifetime(
        world_size=communicator.world_size,
        shares_memory=communicator.shares_memory,
        offloads_params=offload.params,
    )
    multiples = {2: 2048, 4: 1024} if communicator.shares_memory else {}
    cut = PlanSettings(communicator.world_size, lifetime, 40, persistent_numel, share, multiples)
    infos: dict[bool, list[ParameterInfo]] = {True: [], False: []}
    for name, p in named:
        in_block = lifetime is Lifetime.GATHERED and name.startswith("1.")  # "1.2.0.weight" is in block 2
        block = int(name.split(".")[1]) if in_block else None
        infos[p.requires_grad].append(ParameterInfo(name, tuple(p.shape), 0, 2, "torch.bfloat16", block))
    trained, frozen = plan_trained(infos[True], cut), plan_frozen(infos[False], cut)

    built = build_units(
        model,
        [(name, p, 0) for name, p in named if p.requires_grad],
        {name: p for name, p in named if not p.requires_grad},
        UnitSettings(
            40, torch.bfloat16, unit_classes=["Sequential"], persistent_numel=persistent_numel, offload=offload
        ),
        communicator=communicator,
        gathering=communicator,
        policy=policy,
        streams=HostStreams(),
    )
    units = [*built.trained, *built.frozen]
    plans = [*trained, *frozen]
    assert [unit.layout for unit in units] == [plan.layout for plan in plans]
    assert [unit.offloads for unit in built.trained] == [plan.offloads for plan in trained]
    assert [u.residence.comes_and_goes for u in units] == [p.lifetime is not Lifetime.ALWAYS for p in plans]
    modules = [*model[1], model]
    for unit, plan in zip(units, plans, strict=True):
        group = next((g for g in built.groups if any(u is unit for u in g.units)), None)
        expected = modules[-1 if plan.block is None else plan.block] if unit.residence.comes_and_goes else None
        assert (None if group is None else group.module) is expected


def test_what_refuses_a_model_leaves_it_as_it_was():
    """Promise 7: a frozen parameter that is at fault is found before a trained one has moved."""
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3, device="meta")])
    model[1].requires_grad_(False)
    weight = model[0].weight
    before = weight.data_ptr()
    with pytest.raises(ValueError, match=r"'1\.weight' is on device 'meta'"):
        build_units(
            model,
            [("0.weight", weight, 0)],
            {"1.weight": model[1].weight},
            UnitSettings(40),
            communicator=TwoRanks(),
            gathering=TwoRanks(),
            policy=stage_policy(3),
            streams=HostStreams(),
        )
    assert weight.data_ptr() == before
    assert type(weight) is nn.Parameter
