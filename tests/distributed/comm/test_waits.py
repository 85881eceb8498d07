"""Who waits for whom: the rank that comes late is named, over every transport and in pipelines."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import partita
import pipelines
import pytest
import small_models
import torch
from every_transport import ONE_HOST, TORCH, TWO_HOSTS, communicator_on
from partita.comm import WaitsLedger
from partita.comm.grid import ProcessGrid
from partita.monitor import Waits, WaitTable

STEPS = 3


def clearly(check: Callable[[float], None]) -> None:
    """Calls `check` with the seconds that a rank is late, longer and longer until it passes.

    What else holds ranks up, on a machine with much to do, is short beside one of these.
    """
    for late_s in (0.25, 1.0, 4.0):
        try:
            return check(late_s)
        except AssertionError:
            if late_s == 4.0:
                raise


def _late_collectives(hosts: tuple[str, ...], slow: int, late_s: float) -> tuple[list[float], float]:
    with communicator_on(hosts) as communicator:
        before = communicator.waited()
        buffer = communicator.empty(communicator.world_size * 5000, torch.float32).fill_(1.0)
        for collective in (communicator.all_reduce, communicator.reduce_scatter, communicator.all_gather):
            if communicator.rank == slow:
                time.sleep(late_s)
            collective(buffer).wait()
        waited = communicator.waited() - before
        return list(waited.by_rank_s), waited.unknown_s


@pytest.mark.parametrize("slow", [0, 2])
def test_shared_memory_puts_a_wait_down_to_the_rank_that_came_last(ranks, slow):
    def check(late_s: float) -> None:
        rows = ranks(3).run(_late_collectives, ONE_HOST[3], slow, late_s)
        for rank, (by_rank, unknown) in enumerate(rows):
            assert unknown == 0.0
            if rank != slow:
                others = [seconds for r, seconds in enumerate(by_rank) if r != slow]
                assert by_rank[slow] > 2 * sum(others)

    clearly(check)


def test_over_gloo_the_rank_that_waits_least_is_the_slow_one(ranks):
    def check(late_s: float) -> None:
        rows = ranks(3).run(_late_collectives, TORCH[3], 1, late_s)
        unknown = [each for _, each in rows]
        assert all(sum(by_rank) == 0.0 for by_rank, _ in rows)
        assert min(range(3), key=unknown.__getitem__) == 1
        assert unknown[0] > 2 * unknown[1] and unknown[2] > 2 * unknown[1]

    clearly(check)


def test_over_several_hosts_the_others_of_a_host_are_known(ranks):
    """Rank 1 is no leader: its own leader waits for it, and the other host's ranks wait for theirs."""

    def check(late_s: float) -> None:
        rows = ranks(4).run(_late_collectives, TWO_HOSTS["2+2"], 1, late_s)
        by_rank, _ = rows[0]
        assert by_rank[1] > 2 * (by_rank[0] + by_rank[2] + by_rank[3])
        totals = [sum(by_rank) + unknown for by_rank, unknown in rows]
        assert totals[1] == min(totals)
        assert all(each >= 0.0 for by_rank, unknown in rows for each in (*by_rank, unknown))

    clearly(check)


def _asked_often(hosts: tuple[str, ...], slow: int, late_s: float) -> tuple[float, float]:
    with communicator_on(hosts) as communicator:
        began = time.perf_counter()
        for _ in range(4):
            if communicator.rank == slow:
                time.sleep(late_s / 4)
            communicator.all_reduce(torch.ones(8)).wait()
            communicator.waited()
        elapsed = time.perf_counter() - began
        assert communicator.waited() == communicator.waited()  # nothing has happened
        return communicator.waited().total_s, elapsed


@pytest.mark.parametrize("hosts", [ONE_HOST[3], TORCH[3], TWO_HOSTS["1+2 interleaved"]], ids=["one", "gloo", "two"])
def test_asking_counts_no_time_twice(ranks, hosts):
    def check(late_s: float) -> None:
        rows = ranks(3).run(_asked_often, hosts, 1, late_s)
        assert all(0.0 <= waited <= elapsed for waited, elapsed in rows)
        assert min(waited for waited, _ in (rows[0], rows[2])) > rows[1][0]

    clearly(check)


def _messages(hosts: tuple[str, ...], late_s: float) -> Any:
    with communicator_on(hosts) as communicator:
        tensor = torch.ones(50_000)
        if communicator.rank == 0:
            time.sleep(late_s)
            communicator.send(tensor, 1).wait()
        elif communicator.rank == 1:
            communicator.recv(tensor, 0).wait()
        return communicator.waited()


@pytest.mark.parametrize("hosts", [ONE_HOST[3], TORCH[3], TWO_HOSTS["1+2 interleaved"]], ids=["one", "gloo", "two"])
def test_a_message_is_waited_for_by_its_receiver(ranks, hosts):
    def check(late_s: float) -> None:
        by_rank = ranks(3).run(_messages, hosts, late_s)[1].by_rank_s
        assert by_rank[0] > 2 * (by_rank[1] + by_rank[2])

    clearly(check)


# -- steps of an engine


def _warm_up() -> None:
    """What the first step of a process imports is not waited for later."""
    engine, *_ = partita.initialize(model=small_models.seeded(), config=small_models.config())
    _steps(engine, 1, None)
    engine.destroy()


def _steps(engine: Any, count: int, slow: int | None, late_s: float = 0) -> None:
    for step in range(count):
        loss = engine(small_models.inputs(step, 2))
        if engine.global_rank == slow:
            time.sleep(late_s)
        engine.backward(loss)
        engine.step()


def _late_steps(stage: int, slow: int, transport: str, late_s: float) -> tuple[Waits, Waits]:
    """One rank is late before each backward, whose reductions the others wait in."""
    _warm_up()
    config = small_models.config(zero_optimization={"stage": stage}, comm={"transport": transport})
    engine, *_ = partita.initialize(model=small_models.seeded(), config=config)
    _steps(engine, STEPS, slow, late_s)
    waits = engine.waits()
    again = engine.waits()
    engine.destroy()
    return waits, again


@pytest.mark.parametrize(("stage", "carrier"), [(0, "auto"), (2, "auto"), (3, "torch"), (1, "torch")])
def test_the_ledger_names_the_late_rank(ranks, stage, carrier):
    def check(late_s: float) -> None:
        results = ranks(3).run(_late_steps, stage, 1, carrier, late_s)
        for waits, again in results:
            assert waits == results[0][0]  # all ranks have one table
            assert waits.last_step.slowest_rank == waits.run.slowest_rank == 1
            for table in (waits.last_step, waits.run):
                assert min(range(3), key=table.waited_s.__getitem__) == 1
                assert 0.0 < table.waited_share <= 1.0
                _assert_consistent(table)
            assert again.last_step == waits.last_step
            assert all(a >= b for a, b in zip(again.run.elapsed_s, waits.run.elapsed_s, strict=True))
            assert "the slowest: rank 1" in str(waits)

    clearly(check)


def _assert_consistent(table: WaitTable) -> None:
    for rank in range(3):
        assert table.seconds[rank][rank] == 0.0
        assert 0.0 <= table.waited_s[rank] <= table.elapsed_s[rank]


def _late_stage(slow: int, late_s: float) -> Waits:
    _warm_up()
    batch = [pipelines.micro_batch(0, m) for m in range(4)]
    engine, *_ = partita.initialize(model=pipelines.Shape(blocks=2).module(2), config=pipelines.config_for(4))
    layers = [m for m in engine.module.modules() if isinstance(m, pipelines.Block)]
    if engine.global_rank == slow:
        layers[0].register_forward_pre_hook(lambda *_: time.sleep(late_s))
    for _ in range(2):
        engine.train_batch(iter(batch))
    waits = engine.waits()
    engine.destroy()
    return waits


@pytest.mark.parametrize("slow", [0, 1])
def test_in_a_pipeline_the_slow_stage_is_waited_for(ranks, slow):
    def check(late_s: float) -> None:
        for waits in ranks(2).run(_late_stage, slow, late_s):
            assert waits.last_step.slowest_rank == slow
            seconds = waits.run.seconds
            assert seconds[1 - slow][slow] > 2 * seconds[slow][1 - slow]

    clearly(check)


def _alone_and_before_a_step() -> Any:
    engine, *_ = partita.initialize(model=small_models.seeded(), config=small_models.config())
    waits = engine.waits()
    engine.destroy()
    return waits


def test_before_a_step_there_is_only_the_run(ranks):
    waits = ranks(2).run(_alone_and_before_a_step)[0]
    assert waits.last_step is None and waits.run is not None


def test_one_process_waits_for_nobody():
    waits = _alone_and_before_a_step()
    assert waits.last_step is None
    assert waits.run.seconds == ((0.0,),) and waits.run.waited_share == 0.0 and waits.run.slowest_rank is None


def _grid_of(hosts: tuple[str, ...], late_s: float) -> list[float]:
    """The waits of all axes, by rank of the world: pipelines of 2 ranks, 2 copies."""
    from partita.comm import world_communicator

    grid = ProcessGrid(world_communicator, 2)
    ledger = WaitsLedger(grid)
    if grid.world.rank == 3:  # (pipe 1, data 1)
        time.sleep(late_s)
    grid.data.all_reduce(torch.ones(4)).wait()
    if grid.world.rank == 0:  # (pipe 0, data 0)
        time.sleep(3 * late_s)
    grid.pipe.all_reduce(torch.ones(4)).wait()
    row = ledger.take()
    grid.close()
    return row


def test_waits_of_all_axes_are_by_rank_of_the_world(ranks):
    def check(late_s: float) -> None:
        rows = ranks(4).run(_grid_of, ONE_HOST[4], late_s)
        awaited = [row[1:5] for row in rows]
        assert awaited[2][1] == awaited[2][2] == 0.0
        assert awaited[2][3] > 0.0 and awaited[2][0] > awaited[2][3]  # in its data group, and then in its pipeline
        for rank, row in enumerate(rows):
            own = row[5:]
            assert not any(own[:rank]) and not any(own[rank + 1 :])
            assert own[rank] == pytest.approx(sum(row[1:5]))

    clearly(check)
