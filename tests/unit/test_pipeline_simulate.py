"""Simulated pipeline steps: times, idle time, memory and critical path equal those of a clock that ticks."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from partita.pipeline import Costs, Schedule, ScheduleError, by_name, draw, simulate, timeline

FORMS = [("1f1b", 3, 5), ("gpipe", 3, 4), ("interleaved", 2, 4), ("zb-h1", 3, 5), ("zb-v", 2, 4), ("dualpipe-v", 2, 5)]


def ticked(schedule: Schedule, costs: Costs, skips: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """(start, end) of every action. At every tick, a rank that is free begins its next action if all is there."""
    edges = [(s, s + 1) for s in range(schedule.num_stages - 1)] + skips
    where = schedule.stage_ranks
    ranks = range(schedule.num_ranks)
    times: list[list[tuple[int, int]]] = [[] for _ in ranks]
    free = [0 for _ in ranks]
    queue_free: dict[tuple[int, int], int] = {}
    there: dict[tuple[str, int, int, int], int] = {}  # kind, stage, micro-batch, rank
    ending: list[tuple[int, int, int, str, int, int]] = []  # end, rank, then in which order
    tick = 0
    while any(len(times[rank]) < len(schedule.actions[rank]) for rank in ranks):
        for end, rank, _, kind, stage, m in sorted(ending):
            if end != tick:
                continue
            there[kind, stage, m, rank] = tick
            for a, b in sorted(edges):
                to = b if kind == "F" and a == stage else a if kind in "BI" and b == stage else None
                if to is None or where[to] == rank:
                    continue
                size = costs.output_bytes[stage if kind == "F" else to]
                begin = max(tick, free[rank] if not costs.overlap else 0, queue_free.get((rank, where[to]), 0))
                arrival = begin + int(costs.latency + size / costs.bandwidth)
                queue_free[rank, where[to]] = there["F" if kind == "F" else "B", stage, m, where[to]] = arrival
                if not costs.overlap:
                    free[rank] = arrival
        ending = [one for one in ending if one[0] > tick]
        for rank in ranks:
            while len(times[rank]) < len(schedule.actions[rank]) and free[rank] <= tick:
                kind, stage, m = schedule.actions[rank][len(times[rank])]
                if kind == "F":
                    needs = [[("F", a, m)] for a, b in edges if b == stage]
                elif kind == "W":
                    needs = [[("I", stage, m)]]
                else:
                    needs = [[("F", stage, m)], *([("B", b, m), ("I", b, m)] for a, b in edges if a == stage)]
                if not all(any(there.get((*one, rank), tick + 1) <= tick for one in either) for either in needs):
                    break
                i, w = costs.backward_input[stage], costs.backward_weight[stage]
                length = int({"F": costs.forward[stage], "I": i, "W": w, "B": i + w}[kind])
                times[rank].append((tick, tick + length))
                free[rank] = tick + length
                ending.append((tick + length, rank, len(times[rank]), kind, stage, m))
        tick += 1
    return times


@given(st.sampled_from(FORMS), st.data())
@settings(max_examples=120, deadline=None, derandomize=True)
def test_times_are_those_of_a_ticking_clock(form, data):
    schedule = by_name(*form)
    stages = schedule.num_stages
    times = st.tuples(*[st.integers(1, 7)] * stages)
    skips = [(0, stages - 1)] if stages > 2 and data.draw(st.booleans()) else []
    costs = Costs(
        *(data.draw(times) for _ in range(3)),
        output_bytes=data.draw(st.tuples(*[st.integers(0, 4)] * stages)),
        latency=data.draw(st.integers(0, 3)),
        bandwidth=data.draw(st.sampled_from([1, 0.5])),
        overlap=data.draw(st.booleans()),
    )
    run = simulate(schedule, costs, iter(skips))
    assert [[(span.start, span.end) for span in spans] for spans in run.spans] == ticked(schedule, costs, skips)
    assert run.compute_time == max(end for spans in run.spans for _, _, end in spans)


def test_the_critical_path_has_no_gap_and_says_which_stage_to_shrink():
    costs = Costs((1, 1, 3, 1), (1, 1, 3, 1), (1, 1, 3, 1))
    run = simulate(by_name("1f1b", 4, 8), costs)
    path = run.critical_path
    assert path[0].start == 0 and path[-1].end == run.compute_time
    assert all(first.end == second.start for first, second in pairwise(path))
    shares = run.stage_shares()
    assert max(shares, key=shares.get) == 2 and sum(shares.values()) == pytest.approx(1)
    shorter = simulate(by_name("1f1b", 4, 8), Costs((1, 1, 2, 1), (1, 1, 2, 1), (1, 1, 2, 1)))
    assert shorter.compute_time < run.compute_time
    other = simulate(by_name("1f1b", 4, 8), Costs((0.9, 1, 3, 1), (1, 1, 3, 1), (1, 1, 3, 1)))
    assert run.compute_time - other.compute_time == pytest.approx(0.1)  # its one forward on the path


def test_reductions_run_beside_computing_and_updates_after_all():
    """A rank reduces one stage after the other; every rank updates when all have reduced, as clipping needs."""
    base = Costs.equal(4)
    schedule = by_name("looped-bfs", 2, 4, 2)
    plain = simulate(schedule, base)
    late = {s: max(span.end for spans in plain.spans for span in spans if span.action.stage == s) for s in range(4)}
    reduce, update = (3, 3, 3, 3), (1, 2, 3, 4)
    run = simulate(
        schedule, Costs(base.forward, base.backward_input, base.backward_weight, reduce=reduce, update=update)
    )
    by_rank = [max(late[2 + rank] + 3, late[rank]) + 3 for rank in (0, 1)]
    assert run.compute_time == plain.compute_time
    assert run.time == max(by_rank) + max(1 + 3, 2 + 4)


def test_memory_is_counted_in_bytes():
    """States all the time, activations until I, their share for W until W, and the gradient that a backward gets."""
    costs = Costs((1, 1), (1, 1), (1, 1), (10, 20), (4, 5), (3, 7), (100, 200))
    split = simulate(by_name("zb-h1", 2, 4), costs)
    assert split.peak_bytes == (100 + 2 * 10 + 3, 200 + 20 + 5 + 7)
    joint = simulate(by_name("gpipe", 2, 4), costs)
    assert joint.peak_bytes == (100 + 4 * 10 + 3, 200 + 4 * 20 + 7)
    assert simulate(by_name("forward-only", 2, 4), costs).peak_bytes == (100, 200)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"forward": (1,)}, "forward has 1 values, and the schedule 2 stages"),
        ({"backward_weight": (1, -1)}, r"backward_weight = \(1, -1\)"),
        ({"activation_bytes": (1, 2, 3)}, "activation_bytes has 3 values"),
        ({"forward": (float("nan"), 1)}, "forward = "),
        ({"latency": -1.0}, "latency = -1.0"),
        ({"bandwidth": 0.0}, "bandwidth = 0.0"),
    ],
)
def test_costs_that_are_none_are_refused(changes, message):
    values = {"forward": (1, 1), "backward_input": (1, 1), "backward_weight": (1, 1), **changes}
    with pytest.raises(ScheduleError, match=message):
        simulate(by_name("1f1b", 2, 2), Costs(**values))


def test_a_step_is_drawn(tmp_path):
    run = simulate(by_name("1f1b", 2, 2), Costs.equal(2))
    assert timeline(run) == "0 FF..BB.BB\n1 .FBBFBB.."
    chunks = simulate(by_name("interleaved", 2, 2), Costs.equal(4))
    assert timeline(chunks).splitlines()[0].startswith("0 FFff")
    assert max(len(line) for line in timeline(simulate(by_name("gpipe", 2, 99), Costs.equal(2)), 60).splitlines()) <= 60
    for suffix, begin in ((".svg", b"<?xml"), (".png", b"\x89PNG")):
        path = tmp_path / f"run{suffix}"
        draw(run, path)
        assert path.read_bytes().startswith(begin)
    with pytest.raises(ValueError, match=r"'run\.txt': a picture's name ends with one of"):
        draw(run, Path("run.txt"))
