"""Pipeline schedules by name: bubble, idle time and memory are those of the papers, for any ranks and micro-batches."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from partita.pipeline import NAMES, Costs, Schedule, ScheduleError, auto, by_name, prove, simulate

SIZES = [(p, m) for p in (1, 2, 3, 4, 5, 8, 11) for m in sorted({1, 2, p, p + 1, 2 * p, 3 * p + 1})]


def made(name: str, ranks: int, micro_batches: int, chunks: int | None = None) -> Schedule:
    try:
        return by_name(name, ranks, micro_batches, chunks)
    except ScheduleError as error:
        assert name in ("interleaved", "dualpipe-v"), error
        pytest.skip(str(error))


@pytest.mark.parametrize("forward, backward", [(1, 2), (3, 4)])
@pytest.mark.parametrize("ranks, micro_batches", SIZES)
def test_bubble_of_joint_backwards(ranks, micro_batches, forward, backward):
    """(P-1)/(vM+P-1): GPipe 1811.06965, 1F1B and interleaved 2104.04473, breadth-first 2211.05953."""
    for name, chunks in [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("looped-bfs", 2)]:
        if chunks > 1 and micro_batches % ranks:
            continue  # the formula is of whole rounds
        schedule = by_name(name, ranks, micro_batches, chunks)
        run = simulate(schedule, Costs.equal(chunks * ranks, forward, backward / 2, backward / 2))
        assert run.bubble == pytest.approx((ranks - 1) / (chunks * micro_batches + ranks - 1)), name


@pytest.mark.parametrize("ranks, micro_batches", [(p, m) for p, m in SIZES if m >= 2 * p])
@pytest.mark.parametrize(
    "name, idle, gaps, memory",
    [
        ("1f1b", lambda p: 3 * (p - 1), lambda p: 3 * (p - 1), lambda p: p),
        ("zb-h1", lambda p: p - 1, lambda p: p - 1, lambda p: p),
        ("zb-h2", lambda p: p - 1, lambda p: 0, lambda p: 2 * p - 1),
        ("zb-v", lambda p: p - 1, lambda p: p - 1, lambda p: 2 * p),
        ("v-half", lambda p: 3 * p, lambda p: 3 * p, lambda p: 2 * ((p + 2) // 2)),
        ("v-min", lambda p: 4 * p, lambda p: 4 * p, lambda p: 2 * ((p + 4) // 3)),
        ("dualpipe-v", lambda p: 2 * (p - 1), lambda p: 2 * (p - 1), lambda p: 2 * p + 1),
    ],
)
def test_idle_time_and_memory_of_split_backwards(name, idle, gaps, memory, ranks, micro_batches):
    """F = I = W = 1: 2401.10241 section 2 (H1, H2) and 5, 2405.15362 table 1, DeepSeek's DualPipe.

    idle: within the step; gaps: between a rank's first action and its last; memory: activations of stages. Nowhere
    more than the source says, and H1, H2 and ZB-V exactly that.
    """
    schedule = by_name(name, ranks, micro_batches)
    run = simulate(schedule, Costs.equal(schedule.num_stages))
    lengths = [spans[-1].end - spans[0].start for spans in run.spans]
    work = 3 * micro_batches * schedule.num_stages // ranks
    assert max(run.idle) <= idle(ranks)
    assert max(lengths) - work <= gaps(ranks)
    assert max(run.peak_bytes) == max(prove(schedule).held) <= memory(ranks)
    if name.startswith(("1f1b", "zb")):
        assert max(run.idle) == idle(ranks)
        assert max(lengths) - work == gaps(ranks)


@pytest.mark.parametrize("costs", [(1, 1, 1), (2, 3, 2), (5, 4, 1)])
def test_idle_time_of_h1_is_that_of_its_formula(costs):
    """(P-1)(F+I-W)."""
    f, i, w = costs
    for ranks in (2, 3, 4, 8):
        run = simulate(by_name("zb-h1", ranks, 3 * ranks), Costs.equal(ranks, f, i, w))
        assert max(run.idle) == (ranks - 1) * (f + i - w)


@pytest.mark.parametrize("ranks, micro_batches", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_is_proved(name, ranks, micro_batches):
    proof = prove(made(name, ranks, micro_batches))
    assert sum(map(len, made(name, ranks, micro_batches).actions)) == len(proof.order)


@pytest.mark.parametrize(
    "name", [name if name in ("1f1b", "v-half") else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_large_ones(name):
    """64 ranks, 512 micro-batches: a quarter of a million actions."""
    schedule = by_name(name, 64, 512)
    assert len(prove(schedule).order) >= 64 * 512


@given(st.integers(1, 5), st.integers(1, 12), st.sampled_from([1, 2, 3]), st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_best_for_given_costs_keeps_to_the_memory(ranks, micro_batches, chunks, data):
    """Proved, within the memory, not slower than what else fits; or nothing fits, which is said with a figure."""
    stages = ranks * chunks
    times = st.tuples(*[st.integers(1, 9)] * stages)
    sizes = st.tuples(*[st.integers(0, 5)] * stages)
    costs = Costs(
        *(data.draw(times) for _ in range(3)),
        activation_bytes=tuple(size + 3 for size in data.draw(sizes)),
        weight_bytes=tuple(min(3, size) for size in data.draw(sizes)),
        output_bytes=data.draw(sizes),
        state_bytes=data.draw(sizes),
        latency=data.draw(st.integers(0, 2)),
        bandwidth=data.draw(st.sampled_from([1.0, 4.0, float("inf")])),
    )
    memory = data.draw(st.lists(st.integers(1, 60 * chunks), min_size=ranks, max_size=ranks))
    try:
        run = simulate(auto(ranks, micro_batches, costs, memory), costs)
    except ScheduleError as error:
        assert "the most frugal needs" in str(error)
        return
    assert all(peak <= limit for peak, limit in zip(run.peak_bytes, memory, strict=True))
    others = [name for name in NAMES if name != "forward-only"]
    for name in others:
        try:
            other = simulate(by_name(name, ranks, micro_batches, chunks), costs)
        except ScheduleError:
            continue
        if all(peak <= limit for peak, limit in zip(other.peak_bytes, memory, strict=True)):
            assert run.time <= other.time, name


def test_memory_makes_a_schedule_slower_and_not_impossible():
    costs = Costs.equal(8)
    times = [simulate(auto(4, 16, costs, [memory] * 4), costs).time for memory in (4, 6, 8)]
    assert times == sorted(times, reverse=True) and times[0] > times[-1]
    with pytest.raises(ScheduleError, match=r"the most frugal needs \[2, 2, 2, 2\]|the most frugal needs \[4"):
        auto(4, 16, costs, [1] * 4)


def test_costs_of_times_alone_are_enough():
    """Nothing has bytes then, and every memory does."""
    costs = Costs((1, 2, 1), (1, 2, 1), (1, 2, 1))
    assert simulate(auto(3, 6, costs, [0, 0, 0]), costs).peak_bytes == (0, 0, 0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("1f1", 2, 4), "did you mean '1f1b'"),
        (("nothing", 2, 4), "no schedule 'nothing'; valid are 1f1b, dualpipe-v"),
        (("1f1b", 0, 4), "0 ranks and 4 micro-batches"),
        (("1f1b", 2, 0), "2 ranks and 0 micro-batches"),
        (("zb-v", 2, 4, 3), "zb-v has 2 stages per rank, and chunks = 3"),
        (("1f1b", 2, 4, 2), "1f1b has 1 stage per rank, and chunks = 2"),
        (("interleaved", 2, 4, 0), "chunks = 0"),
        (("dualpipe-v", 4, 7), "take at least 8"),
        (("interleaved", 4, 13), "take 12 or 16, or another multiple of 4"),
    ],
)
def test_what_a_family_does_not_do_is_said(arguments, message):
    with pytest.raises(ScheduleError, match=message):
        by_name(*arguments)
