"""SIGTERM and SIGUSR1 save once and end the run, on all ranks after the same step, whoever gets the signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import partita
import pytest
from partita.checkpoint import checkpoints
from resumed import config_for, engine_for, take_steps

STEPS, STOP_IN = 6, 3  # the signal comes in the third step


def _run(
    config: dict[str, Any], number: signal.Signals, told: list[int], micro_batch: int
) -> tuple[str, int, str, dict[str, Any]]:
    """How a run ends in which a signal comes within a micro-batch, and what is seen of its steps."""
    before = signal.getsignal(number)
    engine = engine_for(config, seed=1)
    runs = 0

    def send(*_: Any) -> None:
        nonlocal runs
        runs += 1
        if runs == (STOP_IN - 1) * engine.gradient_accumulation_steps() + micro_batch and engine.global_rank in told:
            os.kill(os.getpid(), number)

    engine.module.register_forward_pre_hook(send)
    found: list[dict[str, Any]] = []
    how, path = "ran to its end", ""
    try:
        for _ in range(STEPS):
            found.append(take_steps(engine, 1))
    except partita.Preempted as ended:
        assert (ended.code, ended.step) == (0, engine.global_steps)
        how, path = "preempted", str(ended.path)
    step = engine.global_steps
    engine.destroy()
    assert signal.getsignal(number) is before
    return how, step, path, {"steps": found}


@pytest.mark.parametrize("comm", ["shared_memory", "torch"])
@pytest.mark.parametrize(("number", "told"), [("SIGTERM", [0, 1]), ("SIGUSR1", [1]), ("SIGTERM", [0])])
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_all_end_after_the_same_step(ranks, tmp_path, comm, number, told, micro_batch):
    """Three micro-batches per step; the signal comes within one of them."""
    checkpoint = {"dir": str(tmp_path)}
    config = config_for(2, 2, "fp32", comm={"transport": comm}, checkpoint=checkpoint, train_micro_batch_size_per_gpu=2)
    ended = ranks(2).run(_run, config, signal.Signals[number], told, micro_batch)
    assert [one[:3] for one in ended] == [("preempted", STOP_IN, str(tmp_path / f"global_step{STOP_IN}"))] * 2
    assert [found.manifest.step for found in checkpoints(tmp_path)] == [STOP_IN]


def test_goes_on_where_it_ended(ranks, tmp_path):
    config = config_for(2, 2, "fp32")
    whole = ranks(2).run(_run, config, signal.SIGTERM, [], 1)
    config |= {"checkpoint": {"dir": str(tmp_path)}}
    first = ranks(2).run(_run, config, signal.SIGTERM, [1], 1)
    second = ranks(2).run(_go_on, config)
    for rank in (0, 1):
        done = len(first[rank][3]["steps"])  # the step that ends the run tells its loss to nobody
        assert done == STOP_IN - 1
        assert first[rank][3]["steps"] == whole[rank][3]["steps"][:done]
        assert second[rank] == whole[rank][3]["steps"][STOP_IN:]


def _go_on(config: dict[str, Any]) -> list[dict[str, Any]]:
    engine = engine_for(config, seed=2)
    found = [take_steps(engine, 1) for _ in range(STEPS - engine.global_steps)]
    engine.destroy()
    return found


def test_a_step_is_saved_once(ranks, tmp_path):
    """It is one that is saved anyway."""
    config = config_for(2, 2, "fp32", checkpoint={"dir": str(tmp_path), "interval_steps": STOP_IN, "keep_last": 1})
    ended = ranks(2).run(_run, config, signal.SIGTERM, [0, 1], 1)
    assert [one[:2] for one in ended] == [("preempted", STOP_IN)] * 2


# -- one process


def _wait_for(engine: partita.Engine, ended: list[partita.Preempted]) -> None:
    try:
        take_steps(engine, 1)
    except partita.Preempted as error:
        ended.append(error)


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    return config_for(1, 0, "fp32", checkpoint={"dir": str(tmp_path / "saved")})


def test_without_a_folder_signals_are_not_touched(ranks):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    engine = engine_for(config_for(1, 0, "fp32"), seed=1)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
    engine.destroy()


def test_a_handler_of_the_program_is_called_too(config):
    called: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: called.append(number))
    try:
        ended: list[partita.Preempted] = []
        engine = engine_for(config, seed=1)
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)  # some clusters say it twice
        _wait_for(engine, ended)
        engine.destroy()
        assert called == [signal.SIGUSR1] * 2
        assert len(ended) == 1
        signal.raise_signal(signal.SIGUSR1)
        assert called == [signal.SIGUSR1] * 3
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_an_engine_outside_of_the_main_thread_takes_no_signals(config):
    before = signal.getsignal(signal.SIGTERM)
    made: list[Any] = []
    thread = threading.Thread(target=lambda: made.append(engine_for(config, seed=1)))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
    made[0].destroy()


def test_an_engine_that_nobody_has_any_more_gives_signals_back(config):
    import gc

    before = signal.getsignal(signal.SIGTERM)
    engine = engine_for(config, seed=1)
    assert signal.getsignal(signal.SIGTERM) is not before
    del engine
    gc.collect()
    assert signal.getsignal(signal.SIGTERM) is before


PROGRAM = """
import os, signal, sys, time
from resumed import config_for, engine_for, take_steps
engine = engine_for(config_for(1, 0, "fp32", checkpoint={"dir": sys.argv[1]}), seed=1)
if sys.argv[2] == "fork":
    is_up, says = os.pipe()
    child = os.fork()
    if not child:
        os.write(says, b"!")  # before, Python forgets signals
        time.sleep(60)
    os.read(is_up, 1)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
elif sys.argv[2] == "late":
    take_steps(engine, 1)
    signal.raise_signal(signal.SIGTERM)
    engine.destroy()
    print("goes on")
else:
    signal.raise_signal(signal.SIGTERM)
    take_steps(engine, 1)
"""


@pytest.mark.parametrize(
    ("what", "code", "output"), [("fork", 0, "-15\n"), ("late", -signal.SIGTERM, ""), ("end", 0, "")]
)
def test_processes(tmp_path, python, what, code, output):
    """A forked process ends as it would; a signal after the last step is not swallowed; a program ends with code 0."""
    command = [*python.command, "-c", PROGRAM, str(tmp_path), what]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert (done.returncode, done.stdout) == (code, output), done.stderr
    assert "Traceback" not in done.stderr
    said = "SIGTERM: saved" in done.stderr
    assert said == (what == "end")
