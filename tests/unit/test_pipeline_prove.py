"""Proofs of pipeline schedules: what runs on the worst transport is proved, with its memory; else it is refused."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from partita.pipeline import (
    NAMES,
    Action,
    Proof,
    Schedule,
    ScheduleError,
    by_name,
    from_text,
    pairs_of,
    plan_of,
    prove,
    require_queues,
    schedule_for,
)

FORMS = [("1f1b", 4, 6), ("gpipe", 3, 4), ("interleaved", 3, 6), ("zb-h1", 4, 5), ("zb-v", 3, 5), ("dualpipe-v", 3, 7)]


def run_by_hand(
    schedule: Schedule, rng: random.Random, skips: list[tuple[int, int]], window: int = 1000
) -> Proof | None:
    """Ranks and queues take turns at random. A tensor moves when the sender has sent it, the receiver has posted its
    receive, and all before it in the queue have moved. A sender waits while more than `window` are not posted.
    Returns the peaks that were seen; None: nothing moves any more.
    """
    edges = [(s, s + 1) for s in range(schedule.num_stages - 1)] + skips
    ranks = range(schedule.num_ranks)
    where = schedule.stage_ranks
    made: set[tuple[str, int, int, int]] = set()  # kind, stage, micro-batch, rank
    sends: dict[tuple[int, int], list] = {(a, b): [] for a in ranks for b in ranks}
    for rank in ranks:
        for kind, stage, m in schedule.actions[rank]:
            for a, b in edges:
                to = b if kind == "F" and a == stage else a if kind in "BI" and b == stage else None
                if to is not None and where[to] != rank:
                    sends[rank, where[to]].append(("F" if kind == "F" else "B", stage, m, to))
    posted = dict.fromkeys(sends, 0)
    moved = dict.fromkeys(sends, 0)
    sent = dict.fromkeys(sends, 0)
    place, used = [0 for _ in ranks], [0 for _ in ranks]
    peaks = [[0, 0, 0, 0] for _ in ranks]

    def lacks(rank: int) -> list[tuple[str, int, int, int]]:
        kind, stage, m = schedule.actions[rank][place[rank]]
        if kind == "F":
            needs = [("F", a, m) for a, b in edges if b == stage]
        elif kind == "W":
            needs = [("I", stage, m)]
        else:
            needs = [("F", stage, m)] + [("B", b, m) for a, b in edges if a == stage]
        for what, source, m in needs:
            if where[source] != rank:
                queue = (where[source], rank)
                posted[queue] = max(posted[queue], sends[queue].index((what, source, m, stage)) + 1)
        return [need for need in needs if (*need, rank, stage) not in made and (*need, rank) not in made]

    idle = 0
    while idle < 200 * schedule.num_ranks:
        idle += 1
        if rng.random() < 0.5:
            queue = rng.choice(list(sends))
            if moved[queue] < min(sent[queue], posted[queue]):
                what, stage, m, to = sends[queue][moved[queue]]
                made.add((what, stage, m, queue[1], to))
                moved[queue] += 1
                idle = 0
            continue
        rank = rng.choice(list(ranks))
        is_full = any(sent[queue] - posted[queue] > window for queue in sent if queue[0] == rank)
        if place[rank] == len(schedule.actions[rank]) or lacks(rank) or is_full:
            continue
        idle = 0
        received = sum(posted[queue] for queue in posted if queue[1] == rank) - used[rank]
        kind, stage, m = schedule.actions[rank][place[rank]]
        place[rank] += 1
        made.add((kind if kind in "FI" else "B", stage, m, rank))
        if kind == "I":
            made.add(("B", stage, m, rank))
        done = schedule.actions[rank][: place[rank]]
        count = {kind: sum(a.kind == kind for a in done) for kind in "FBIW"}
        live, waits = count["F"] - count["B"] - count["I"], count["I"] - count["W"]
        peaks[rank] = [max(pair) for pair in zip(peaks[rank], (live, waits, live + waits, received), strict=True)]
        for a, b in edges:
            to = b if kind == "F" and a == stage else a if kind in "BI" and b == stage else None
            if to is not None and where[to] != rank:
                sent[rank, where[to]] += 1
            source = a if kind == "F" and b == stage else b if kind in "BI" and a == stage else None
            used[rank] += source is not None and where[source] != rank
    if any(place[rank] < len(schedule.actions[rank]) for rank in ranks):
        return None
    live, waits, held, received = (tuple(column) for column in zip(*peaks, strict=True))
    return Proof(live, waits, held, received, (), ())


def same(proof: Proof, seen: Proof) -> bool:
    return (proof.activations, proof.waiting_weights, proof.held, proof.received) == (
        seen.activations,
        seen.waiting_weights,
        seen.held,
        seen.received,
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name != "forward-only"])
def test_a_run_by_hand_sees_what_was_proved(name):
    """Ranks and queues in many orders: the same counts in each, as they follow from the order of each rank."""
    schedule = by_name(name, 3, 6)
    for seed in range(5):
        seen = run_by_hand(schedule, random.Random(seed), [])
        assert seen is not None and same(prove(schedule), seen)


@given(st.sampled_from(FORMS), st.integers(0, 2**32), st.integers(0, 6), st.booleans(), st.sampled_from([0, 1, 2, 9]))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_schedule_is_proved_where_it_runs(form, seed, swaps, skips, window):
    """Actions of a rank change places: some of these still run, others do not, and the proof knows which."""
    rng = random.Random(seed)
    schedule = by_name(*form)
    orders = [list(actions) for actions in schedule.actions]
    for _ in range(swaps):
        order = rng.choice(orders)
        i = rng.randrange(len(order) - 1)
        j = min(len(order) - 1, i + rng.randrange(1, 4))
        order[i], order[j] = order[j], order[i]
    changed = Schedule(schedule.stage_ranks, schedule.micro_batches, tuple(map(tuple, orders)))
    edges = [(0, schedule.num_stages - 1)] if skips and schedule.num_stages > 2 else []
    seen = run_by_hand(changed, rng, edges, window)
    if seen is None:
        with pytest.raises(ScheduleError, match="deadlock, ranks"):
            prove(changed, edges, window)
    else:
        assert same(prove(changed, edges, window), seen)


@given(st.sampled_from(FORMS), st.integers(0, 2**32))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_broken_schedules_are_refused(form, seed):
    """An action is missing, twice, on another rank, of another stage, or of no micro-batch."""
    rng = random.Random(seed)
    schedule = by_name(*form)
    orders = [list(actions) for actions in schedule.actions]
    order = rng.choice([order for order in orders if order])
    place = rng.randrange(len(order))
    kind, stage, m = order[place]
    how = rng.choice(["missing", "twice", "elsewhere", "another stage", "no micro-batch"])
    if how == "twice":
        order.insert(rng.randrange(len(order)), order[place])
    elif how == "another stage":
        order[place] = Action(kind, (stage + 1) % schedule.num_stages, m)
    elif how == "no micro-batch":
        order[place] = Action(kind, stage, schedule.micro_batches)
    else:
        moved = order.pop(place)
        if how == "elsewhere":
            others = [other for other in orders if other is not order]
            rng.choice(others).append(moved)
    with pytest.raises(ScheduleError, match=r"rank \d+"):
        prove(Schedule(schedule.stage_ranks, schedule.micro_batches, tuple(map(tuple, orders))))


def test_a_deadlock_is_drawn():
    """Each rank waits for what the other has behind it."""
    schedule = from_text(
        "partita pipeline schedule 1\nstage ranks: 0 1\nmicro-batches: 2\n"
        "rank 0: 0F0 0B0 0F1 0B1\nrank 1: 1F0 1F1 1B0 1B1\n"
    )
    with pytest.raises(ScheduleError) as error:
        prove(schedule)
    assert str(error.value) == (
        "deadlock, ranks 0 -> 1 -> 0:\n"
        "  rank 0 stands before 0B0 and waits for 1B0 of rank 1\n"
        "  rank 1 stands before 1F1 and waits for 0F1 of rank 0"
    )


def test_a_rank_may_wait_for_itself():
    schedule = Schedule((0,), 1, ((Action("I", 0, 0), Action("F", 0, 0), Action("W", 0, 0)),))
    with pytest.raises(ScheduleError, match=re.escape("deadlock, ranks 0 -> 0")):
        prove(schedule)


def test_gradients_are_complete_after_the_last_of_their_weights():
    schedule = by_name("zb-v", 3, 6)
    for stage, last in enumerate(prove(schedule).reduced_after):
        actions = schedule.actions[schedule.stage_ranks[stage]]
        assert last == [a for a in actions if a.stage == stage and a.kind in "BW"][-1]
    assert set(prove(by_name("forward-only", 2, 3)).reduced_after) == {None}


def test_what_arrives_early_counts():
    """Rank 0 sends the first micro-batch first, and rank 1 takes the second first."""
    orders = (("0F0", "0F1", "0B1", "0B0"), ("1F1", "1F0", "1B1", "1B0"))
    text = "\n".join(f"rank {rank}: {' '.join(order)}" for rank, order in enumerate(orders))
    schedule = from_text(f"partita pipeline schedule 1\nstage ranks: 0 1\nmicro-batches: 2\n{text}\n")
    assert prove(schedule).received == (1, 2)


def test_a_full_queue_is_a_deadlock_where_nobody_empties_it():
    """Rank 0 sends rank 1 three tensors, and only then rank 2 what rank 1 waits for before it takes the second."""
    schedule = from_text(
        "partita pipeline schedule 1\nstage ranks: 0 1 0 2 1\nmicro-batches: 3\n"
        "rank 0: 0F0 0F1 0F2 2F0 2F1 2F2\nrank 1: 1F0 4F0 1F1 4F1 1F2 4F2\nrank 2: 3F0 3F1 3F2\n"
    )
    assert prove(schedule, window=2) == prove(schedule)
    with pytest.raises(ScheduleError) as error:
        prove(schedule, window=1)
    assert str(error.value) == (
        "deadlock, ranks 0 -> 1 -> 2 -> 0:\n"
        "  rank 0 stands before 2F0 and has sent rank 1 all that may be under way\n"
        "  rank 1 stands before 4F0 and waits for 3F0 of rank 2\n"
        "  rank 2 stands before 3F0 and waits for 2F0 of rank 0"
    )


@pytest.mark.parametrize("name", NAMES)
def test_few_tensors_are_under_way(name):
    """16 from a rank to another are enough for every family: transports hold many more, and buffers are few."""
    for ranks, micro_batches in [(2, 4), (4, 64), (8, 40)]:
        prove(by_name(name, ranks, micro_batches), window=16)


@pytest.mark.parametrize("skips", [[(1, 1)], [(2, 1)], [(0, 4)], [(-1, 2)]])
def test_skips_lead_forwards(skips):
    with pytest.raises(ScheduleError, match="skips lead forwards"):
        prove(by_name("1f1b", 4, 4), skips)


def test_the_pairs_of_ranks_that_send_to_each_other():
    """Both ways along the chain, skips and ties; the same list on all ranks, nobody with itself."""
    schedule = schedule_for("1f1b", 3, 6, None)
    plans = [plan_of(schedule, rank, [(0, 2)]) for rank in range(3)]
    chain = [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    assert [pairs_of(plan, []) for plan in plans] == [chain] * 3
    plain = plan_of(schedule, 0)
    assert pairs_of(plain, []) == [(0, 1), (1, 0), (1, 2), (2, 1)]
    assert pairs_of(plain, [(0, 2), (1,)]) == chain


@pytest.mark.parametrize("connections", [None, "8", "32", "", "many"])
def test_cudas_own_number_of_queues_is_enough(connections):
    require_queues(plan_of(by_name("interleaved", 2, 4), 0), connections)


@pytest.mark.parametrize("name", ["interleaved", "zb-v"])
def test_several_stages_on_a_rank_need_several_queues(name):
    with pytest.raises(ValueError, match="CUDA_DEVICE_MAX_CONNECTIONS=1, and this schedule has several stages"):
        require_queues(plan_of(by_name(name, 2, 4), 0), "1")
    for one_stage in ("1f1b", "gpipe", "zb-h1"):
        require_queues(plan_of(by_name(one_stage, 2, 4), 0), "1")
