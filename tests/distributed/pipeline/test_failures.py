"""A stage that fails, dies, hangs or does not fit: every rank ends with an error that says where and what.

Each test has processes of its own, which are killed and stopped for real.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import partita
import pytest
from jobs import NOTICED_WITHIN_S, Job
from pipelines import Block, Shape, config_for, micro_batch
from torch import Tensor, nn

AT_STEP = 3
Fault = Callable[[nn.Module], None]  # called with the layers of the rank at fault, before a step


def _train(
    rank: int,
    report: Callable[[Any], None],
    pipe: int,
    config: dict[str, Any],
    at_fault: int,
    fault: Fault,
    cut: int,
) -> None:
    """Trains until an error; reports "training", (its kind, its text), the same of a further call, and "destroyed".

    cut: micro-batches that the first copy of the pipeline lacks in step AT_STEP.
    """
    engine, *_ = partita.initialize(model=Shape(tied=True).module(pipe), config=config)
    cut = cut if rank % (engine.world_size // pipe) == 0 else 0
    count = engine.gradient_accumulation_steps()
    try:
        for step in range(AT_STEP + 1):
            if step == AT_STEP:
                report("training")
                if rank == at_fault:
                    fault(engine.module)
            given = count - cut if step == AT_STEP else count
            engine.train_batch(iter([micro_batch(step, m) for m in range(given)]))
    except Exception as error:
        report((type(error).__name__, str(error)))
    try:
        loss = engine.train_batch(iter([micro_batch(9, m) for m in range(count)]))
        report(float(loss))
    except Exception as error:
        report((type(error).__name__, str(error)))
    engine.destroy()
    report("destroyed")


def _nothing(model: nn.Module) -> None:
    pass


def _in_forward(model: nn.Module, act: Callable[[Any], Any], call: int = 1) -> None:
    """`act` gets the output of a layer in its micro-batch `call`, and returns what takes its place."""
    calls = iter(range(1 << 62))
    layer = [child for child in model.children() if isinstance(child, Block)][-1]
    layer.register_forward_hook(lambda _, __, output: act(output) if next(calls) == call else None)


def _raise(model: nn.Module) -> None:
    def act(output: Tensor) -> None:
        raise ZeroDivisionError("in a forward")

    _in_forward(model, act)


def _raise_in_backward(model: nn.Module) -> None:
    def refuse(_: Tensor) -> None:
        raise ZeroDivisionError("in a backward")

    _in_forward(model, lambda output: output.register_hook(refuse) and None)


def _hang(model: nn.Module) -> None:
    def act(output: Tensor) -> None:
        time.sleep(600)

    _in_forward(model, act)


def _give_two(model: nn.Module) -> None:
    _in_forward(model, lambda output: (output, output), call=0)


def _give_fewer_samples(model: nn.Module) -> None:
    _in_forward(model, lambda output: output[1:])


def _give_an_object(model: nn.Module) -> None:
    _in_forward(model, lambda output: object(), call=0)


def _ends(job: Job, ranks: range, at_fault: int | None = None) -> dict[int, tuple[str, str]]:
    """What each of the ranks has raised. All raise again when they are called again, and end."""
    said = {}
    for rank in ranks:
        if rank != at_fault:
            said[rank] = job.report(rank)
            again, text = job.report(rank)
            assert again == "LifecycleError" and "cannot go on" in text, text
            assert job.report(rank) == "destroyed"
            assert job.exits_cleanly(rank)
    return said


def _config(transport: str = "shared_memory", timeout_s: float = 60.0, **pipeline: Any) -> dict[str, Any]:
    comm = {"transport": transport, "timeout_seconds": timeout_s}
    return config_for(4, comm=comm, pipeline={"schedule": "1f1b", **pipeline})


def _job(pipe: int, fault: Fault, at_fault: int = 1, config: dict[str, Any] | None = None, ranks: int = 0) -> Job:
    return Job(ranks or pipe, _train, pipe, config or _config(), at_fault, fault, 0)


def _begun(job: Job) -> range:
    ranks = range(len(job.processes))
    for rank in ranks:
        assert job.report(rank) == "training"
    return ranks


@pytest.mark.parametrize("transport", ["shared_memory", "torch"])
@pytest.mark.parametrize(
    ("fault", "where"),
    [(_raise, "stage 1, micro-batch 1, forward (1F1)"), (_raise_in_backward, "stage 1, micro-batch 1, backward (1B1)")],
)
def test_an_exception_in_a_stage_ends_all(fault, where, transport):
    with _job(3, fault, config=_config(transport)) as job:
        said = _ends(job, _begun(job))
    assert {kind for kind, _ in said.values()} == {"PipelineError"}
    assert said[1][1].startswith(f"rank 1, {where}: ZeroDivisionError: in a ")
    for rank in (0, 2):
        assert said[rank][1].startswith(f"rank {rank}, stage {rank}, micro-batch ")
        assert "ZeroDivisionError" in said[rank][1], said[rank]


def test_a_killed_stage_is_named_by_all_others():
    with _job(3, _hang) as job:
        ranks = _begun(job)
        time.sleep(0.3)
        killed_at = job.signal(1, signal.SIGKILL)
        said = _ends(job, ranks, at_fault=1)
        assert time.monotonic() - killed_at < NOTICED_WITHIN_S + 10  # with the ends of the processes
    for rank in (0, 2):
        kind, text = said[rank]
        assert kind == "PipelineError"
        assert text.startswith(f"rank {rank}, stage {rank}, micro-batch ")
        assert f"rank 1 (process {job.processes[1].pid}) died" in text


def test_a_killed_stage_ends_all_over_gloo():
    with _job(2, _hang, config=_config("torch")) as job:
        ranks = _begun(job)
        time.sleep(0.3)
        job.signal(1, signal.SIGKILL)
        said = _ends(job, ranks, at_fault=1)
    assert said[0][0] == "PipelineError"
    assert said[0][1].startswith("rank 0, stage 0, micro-batch ")


def test_a_hung_stage_is_waited_for_until_the_timeout():
    with _job(2, _hang, config=_config(timeout_s=2.0)) as job:
        ranks = _begun(job)
        kind, text = _ends(job, ranks, at_fault=1)[0]
    assert kind == "PipelineError"
    assert text.startswith("rank 0, stage 0, micro-batch ")
    assert "rank 1" in text and "2 s" in text, text


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (_give_two, "rank 1, stage 1, micro-batch 0, forward (1F0): "),
        (_give_fewer_samples, "what a stage returns must follow from the shapes of its inputs"),
        (_give_an_object, "a stage hands on a object: layers at the border of a stage take and return tensors"),
    ],
)
def test_stages_that_do_not_fit(fault, says):
    with _job(2, fault, at_fault=0) as job:
        said = _ends(job, _begun(job))
    assert {kind for kind, _ in said.values()} == {"PipelineError"}
    assert any(says in text for _, text in said.values()), said


def test_the_other_copies_end_too():
    """2 x 2: the ranks of the other pipeline wait for the gradients of this one."""
    with _job(2, _raise, ranks=4, at_fault=3) as job:
        said = _ends(job, _begun(job))
    assert said[3][1].startswith("rank 3 (rank 1 of its pipeline), stage 1, micro-batch 1, forward (1F1): ZeroDivision")
    assert said[1][1].startswith("rank 1 (rank 0 of its pipeline), stage 0, micro-batch ")
    assert all("ZeroDivisionError" in text for _, text in said.values()), said


@pytest.mark.parametrize(("pipe", "ranks"), [(3, 3), (2, 4)])
def test_missing_data_end_the_step_before_it_begins(pipe, ranks):
    """All ranks raise, those of other copies too, and go on with the next step."""
    with Job(ranks, _train, pipe, _config(), -1, _nothing, 1) as job:
        ranks = _begun(job)
        said = [job.report(rank) for rank in ranks]
        losses = [job.report(rank) for rank in ranks]
    assert {kind for kind, _ in said} == {"ValueError"}
    assert all("the iterator ended after 3 of the 4 micro-batches" in text for _, text in said)
    assert len(set(losses)) == 1 and losses[0] > 0
