"""units/layout.py: the arithmetic of flat buffers, over arbitrary shapes and numbers of ranks."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from partita.units.layout import ALIGNMENT_BYTES, ParameterInfo, UnitLayout, make_layout, plan_buckets

SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
WORLD_SIZES = st.integers(1, 9)

arithmetic = settings(max_examples=50, deadline=None)


@st.composite
def parameters(draw: st.DrawFn, *, max_kinds: int = 1) -> list[ParameterInfo]:
    """Named parameters of up to `max_kinds` kinds; a kind has one element size."""
    kinds = [(f"kind{i}", draw(st.sampled_from([2, 4]))) for i in range(max_kinds)]
    infos = []
    for i, shape in enumerate(draw(st.lists(SHAPES, max_size=12))):
        kind, element_bytes = draw(st.sampled_from(kinds))
        infos.append(ParameterInfo(f"p{i}", shape, draw(st.integers(0, 2)), element_bytes, kind))
    return infos


def element_bytes(infos: list[ParameterInfo]) -> int:
    return infos[0].element_bytes if infos else 4


@arithmetic
@given(parameters(), WORLD_SIZES)
def test_every_parameter_and_every_shard_starts_on_128_bytes(infos, world_size):
    """Section 3 of the design: vector loads and GPU accesses of 16 bytes never straddle."""
    layout = make_layout(infos, world_size)
    starts = [slot.offset for slot in layout.slots] + [layout.shard_range(r).start for r in range(world_size)]
    assert ALIGNMENT_BYTES == 128
    assert [start * element_bytes(infos) % ALIGNMENT_BYTES for start in starts] == [0] * len(starts)


@arithmetic
@given(parameters(), WORLD_SIZES)
def test_parameters_keep_their_order_shape_and_group_and_do_not_overlap(infos, world_size):
    layout = make_layout(infos, world_size)
    assert [(s.name, s.shape, s.group) for s in layout.slots] == [(p.name, p.shape, p.group) for p in infos]
    ends = [0] + [slot.offset + slot.numel for slot in layout.slots]
    assert all(slot.offset >= end for slot, end in zip(layout.slots, ends, strict=False))
    assert ends[-1] <= layout.numel


@arithmetic
@given(parameters(), WORLD_SIZES)
def test_shards_tile_the_buffer_in_equal_parts(infos, world_size):
    """G8: sizes that the ranks do not divide, fewer elements than ranks."""
    layout = make_layout(infos, world_size)
    assert layout.numel % world_size == 0
    covered = []
    for rank in range(world_size):
        shard = layout.shard_range(rank)
        assert len(shard) == layout.shard_numel == layout.numel // world_size
        covered += shard
    assert covered == list(range(layout.numel))


@arithmetic
@given(parameters(), WORLD_SIZES)
def test_padding_is_below_128_bytes_per_parameter_and_shard(infos, world_size):
    layout = make_layout(infos, world_size)
    alignment = ALIGNMENT_BYTES // element_bytes(infos)
    assert layout.numel < sum(p.numel for p in infos) + alignment * (len(infos) + world_size)


@arithmetic
@given(parameters(), WORLD_SIZES)
def test_slices_of_all_ranks_cover_every_element_of_every_parameter_once(infos, world_size):
    """G8, G9: padding is in no slice, zero-size parameters have none, nothing is lost at a shard's edge."""
    layout = make_layout(infos, world_size)
    found: dict[str, list[int]] = {p.name: [] for p in infos}
    for rank in range(world_size):
        shard = layout.shard_range(rank)
        end = 0
        for part in layout.slices(shard):
            assert part.numel > 0
            assert end <= part.shard_offset
            end = part.shard_offset + part.numel
            assert end <= len(shard)
            # the two offsets name the same element of the full buffer
            assert part.slot.offset + part.parameter_offset == shard.start + part.shard_offset
            found[part.slot.name] += range(part.parameter_offset, part.parameter_offset + part.numel)
    assert found == {p.name: list(range(p.numel)) for p in infos}


@arithmetic
@given(parameters(), WORLD_SIZES, st.data())
def test_slices_of_any_range_are_those_of_its_elements(infos, world_size, data):
    layout = make_layout(infos, world_size)
    start = data.draw(st.integers(0, layout.numel))
    elements = range(start, data.draw(st.integers(start, layout.numel)))
    owner = {
        slot.offset + i: (slot.name, i)
        for slot in layout.slots
        for i in range(slot.numel)
        if slot.offset + i in elements
    }
    found = {
        start + part.shard_offset + i: (part.slot.name, part.parameter_offset + i)
        for part in layout.slices(elements)
        for i in range(part.numel)
    }
    assert found == owner


@arithmetic
@given(parameters(), WORLD_SIZES)
def test_a_flat_buffer_is_read_by_the_slices_of_its_layout(infos, world_size):
    """The same element by `in_unit` and `in_parameter`, and by the shard and `in_shard`."""
    layout = make_layout(infos, world_size)
    buffer = list(range(layout.numel))
    for rank in range(world_size):
        shard = layout.shard_range(rank)
        for part in layout.slices(shard):
            piece = buffer[part.slot.in_unit][part.in_parameter]
            assert piece == buffer[shard.start : shard.stop][part.in_shard]
            assert len(piece) == part.numel


@arithmetic
@given(parameters(), WORLD_SIZES, st.sampled_from([1, 3, 32, 96, 1024, 2048]))
def test_a_shard_multiple_pads_the_end_and_moves_no_parameter(infos, world_size, multiple):
    """Shards that are mapped between processes are whole pages, also where 128 bytes do not divide one."""
    plain, layout = make_layout(infos, world_size), make_layout(infos, world_size, multiple)
    assert layout.slots == plain.slots
    assert layout.shard_numel % multiple == 0
    assert layout.shard_numel * element_bytes(infos) % ALIGNMENT_BYTES == 0 or not infos
    assert plain.shard_numel <= layout.shard_numel < plain.shard_numel + multiple * 64
    covered = [part for r in range(world_size) for part in layout.slices(layout.shard_range(r))]
    assert sum(part.numel for part in covered) == sum(p.numel for p in infos)
    if multiple == 1:
        assert layout == plain


def test_without_elements_there_are_no_shards_whatever_the_multiple():
    """G9"""
    assert make_layout([], 3, 1024).numel == 0
    assert make_layout([ParameterInfo("a", (0, 5), 0, 4, "torch.float32")], 3, 1024).numel == 0


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_of_the_group_is_refused_by_number(rank):
    """Promise 7."""
    with pytest.raises(ValueError, match=f"rank {rank} of 2"):
        UnitLayout((), 32, 2).shard_range(rank)


# -- buckets


@arithmetic
@given(parameters(max_kinds=3), st.integers(1, 2000))
def test_every_parameter_is_in_exactly_one_bucket(infos, bucket_numel):
    buckets = plan_buckets(infos, bucket_numel)
    assert sorted(i for bucket in buckets for i in bucket) == list(range(len(infos)))
    assert all(buckets)


@arithmetic
@given(parameters(max_kinds=3), st.integers(1, 2000))
def test_a_bucket_is_within_the_limit_or_holds_one_large_parameter(infos, bucket_numel):
    """G7: a parameter larger than the bucket travels alone; zero-size ones may ride along."""
    for bucket in plan_buckets(infos, bucket_numel):
        sizes = [infos[i].numel for i in bucket if infos[i].numel]
        assert sum(sizes) <= bucket_numel or len(sizes) == 1


@arithmetic
@given(parameters(max_kinds=3), st.integers(1, 2000))
def test_kinds_never_share_a_bucket(infos, bucket_numel):
    assert all(len({infos[i].kind for i in bucket}) == 1 for bucket in plan_buckets(infos, bucket_numel))


@arithmetic
@given(parameters(max_kinds=3), st.integers(1, 2000))
def test_buckets_run_against_the_order_of_registration(infos, bucket_numel):
    """Backward completes the last parameters first: buckets of late layers come first."""
    buckets = plan_buckets(infos, bucket_numel)
    for kind in {p.kind for p in infos}:
        order = [i for bucket in buckets for i in bucket if infos[i].kind == kind]
        assert order == sorted(order, reverse=True)


@arithmetic
@given(parameters(max_kinds=2), st.integers(1, 2000))
def test_a_bucket_is_closed_only_when_the_next_parameter_does_not_fit(infos, bucket_numel):
    """The number of collectives is what the limit asks for, not more."""
    by_kind: dict[str, list[list[int]]] = {}
    for bucket in plan_buckets(infos, bucket_numel):
        by_kind.setdefault(infos[bucket[0]].kind, []).append(bucket)
    for buckets in by_kind.values():
        for bucket, following in pairwise(buckets):
            assert sum(infos[i].numel for i in bucket) + infos[following[0]].numel > bucket_numel


@pytest.mark.parametrize(
    ("limit", "expected"), [(9, [[2], [1], [0]]), (10, [[2], [1], [0]]), (19, [[2], [1], [0]]), (20, [[2, 1], [0]])]
)
def test_limits_at_the_size_of_a_parameter(limit, expected):
    """G7: bucket size = parameter size, -1, and twice that, -1."""
    infos = [ParameterInfo(name, (10,), 0, 4, "torch.float32") for name in "abc"]
    assert plan_buckets(infos, limit) == expected
