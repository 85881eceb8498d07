"""The outcome of a step one step later, as on a GPU: nothing else differs from the CPU's order."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import inside
import partita
import pytest
import torch
from dictated import SPLIT, Dictated, config_for, dictate, share, take_step
from late_streams import LateStreams, on_late_streams
from partita._core import LossScaler
from partita.optim import StepController
from partita.units import Unit
from support import whole
from torch import Tensor

STAGES = (0, 1, 2, 3)
ADAM = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_num_steps": 6, "warmup_max_lr": 0.1, "warmup_type": "linear"}}
PATTERN = "..x.xx...x"  # x: a step that is skipped
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8, "hysteresis": 1, "loss_scale_window": 2}},
    "split": SPLIT,
}


def gradients(engine: partita.Engine, step: int, *, bad: bool) -> dict[str, Tensor]:
    """This rank's; a bad step has one NaN, made by the last rank in parameter c."""
    grads = share(dictate(step), engine.global_rank, engine.world_size)
    if bad and engine.global_rank == engine.world_size - 1:
        grads["c"] = grads["c"].clone()
        grads["c"][3] = float("nan")
    return grads


@contextmanager
def log_lines() -> Iterator[list[str]]:
    """Lines about steps, without times."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda r: lines.append(re.sub(r"[\d.]+ ms/step.*", "", r.getMessage()))  # type: ignore[method-assign]
    logger = logging.getLogger("partita")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _run(config: dict[str, Any], late: bool, asks: bool) -> dict[str, Any]:
    """What a run over PATTERN looks like. `asks`: get_lr(), loss_scale and the like right after every step."""
    seen: dict[str, Any] = {"used": [], "reports": [], "asked": [], "losses": []}
    with on_late_streams() if late else nullcontext(), log_lines() as lines:
        engine = partita.Engine(model=Dictated(), config=config)
        lines.clear()
        with inside.watching_update(engine, lambda: seen["used"].append(inside.learning_rates(engine))):
            for step, event in enumerate(PATTERN):
                for i in range(engine.gradient_accumulation_steps()):
                    loss = engine(gradients(engine, step, bad=event == "x" and i == 0))
                    seen["losses"].append(loss.item())
                    engine.backward(loss)
                    engine.step()
                if asks:
                    norm = engine.get_global_grad_norm()
                    seen["asked"].append(repr((engine.get_lr(), engine.loss_scale, engine.skipped_steps, norm)))
                seen["reports"].append(list(lines))
                lines.clear()
        seen["skipped"] = engine.skipped_steps
        seen["lr"] = engine.get_lr()
        weights = engine.module_state_dict()
        engine.destroy()
        seen["reports"].append(list(lines))
    return {**seen, "weights": weights}


def assert_same(late: dict[str, Any], usual: dict[str, Any]) -> None:
    for what in ("losses", "used", "asked", "skipped", "lr"):
        assert repr(late[what]) == repr(usual[what]), what
    assert late["skipped"] == PATTERN.count("x")
    applied = [PATTERN[:step].count(".") for step in range(len(PATTERN))]
    assert len(set(zip(applied, map(str, late["used"]), strict=True))) == len(set(applied)), "moved in a skipped step"
    for name, value in usual["weights"].items():
        assert torch.equal(late["weights"][name], value), name


CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "clipping": {"gradient_clipping": 0.5},
    "torch optimizer": {"optimizer": {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}}},
}


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize(
    ("world_size", "stage", "precision", "changes"),
    [(1, 0, "fp32", "plain"), (1, 0, "fp16", "clipping"), (1, 0, "split", "accumulation")]
    + [(2, stage, "fp16", "accumulation") for stage in STAGES]
    + [(2, 1, "split", "clipping"), (2, 2, "fp16", "torch optimizer")],
)
def test_losses_rates_and_weights_are_those_of_the_cpu(ranks, world_size, stage, precision, changes, asks):
    """O5, N1, N2: every update uses the learning rate that it would use; asked, the engine is up to date."""
    config = config_for(stage, **{"optimizer": ADAM, "scheduler": WARMUP, **PRECISIONS[precision], **CHANGES[changes]})
    usual = ranks(world_size).run(_run, config, False, asks)
    for ours, theirs in zip(ranks(world_size).run(_run, config, True, asks), usual, strict=True):
        assert_same(ours, theirs)


def test_reports_come_one_step_later(ranks):
    """The same lines; that of the last step when the engine is destroyed. Asking for the learning rate brings it."""
    config = config_for(1, optimizer=ADAM, scheduler=WARMUP, steps_per_print=1)
    for asks in (False, True):
        late, usual = (ranks(2).run(_run, config, is_late, asks)[0]["reports"] for is_late in (True, False))
        assert [len(lines) for lines in usual] == [2 if event == "x" else 1 for event in PATTERN] + [0]
        if asks:
            assert late == usual
        else:
            assert late[0] == []
            # the last line is brought by the get_lr() after the run
            assert late[1:] == usual[:-1]


# -- who waits when


def _waits(config: dict[str, Any]) -> list[tuple[range, list[int], list[int], list[int]]]:
    """For each step, the copies begun, and those waited for in forward and backward, in step(), and in get_lr() after
    odd steps."""
    with on_late_streams() as streams:
        engine = partita.Engine(model=Dictated(), config=config)
        rows = []
        streams.waits()
        for step in range(6):
            engine.backward(engine(gradients(engine, step, bad=step == 2)))
            before, begun = streams.waits(), streams.copies
            with inside.watching_step(engine, lambda: streams.events.append("run")):
                engine.step()
            assert "run" in streams.events
            assert all(e[0] != "wait" for e in streams.events[streams.events.index("run") :]), "waits after the update"
            in_step, copies = streams.waits(), range(begun + 1, streams.copies + 1)
            engine.get_lr() if step % 2 else None
            rows.append((copies, before, in_step, streams.waits()))
        engine.destroy()
    return rows


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_waits_for_the_step_before_and_for_nothing_else(ranks, stage, precision):
    """One copy a step. Copy k is not waited for before the step after it, unless the learning rate is asked for. In the
    first three steps of a model with masters beside its parameters, what others wrote is a second copy."""
    config = config_for(stage, optimizer=ADAM, scheduler=WARMUP, **PRECISIONS[precision])
    has_masters = precision == "fp16" and stage < 3
    for rows in ranks(2).run(_waits, config):
        looks, outcome = list[int](), 0
        for step, (copies, before, in_step, asked) in enumerate(rows):
            assert before == [], f"forward or backward of step {step} waited"
            # After odd steps get_lr() has waited already, and nobody waits a second time.
            assert sorted(in_step) == [*looks, *([outcome] if step % 2 else [])], f"step {step}"
            *looks, outcome = copies
            assert len(looks) == (has_masters and step < 3)
            assert set(asked) == ({outcome} if step % 2 else set()), f"get_lr() after step {step}"


def _around_the_decision(config: dict[str, Any], hooked: bool, folder: str) -> list[list[str]]:
    """For each step, what happened from its sum of squares on: copies begun and waited for, and the update."""
    if folder:
        config = {**config, "checkpoint": {"dir": folder}}
    with on_late_streams() as streams:
        engine = partita.Engine(model=Dictated(), config=config)
        if hooked:
            engine.optimizer.register_step_pre_hook(lambda *_: None)
        rows = []
        for step in range(4):
            engine.backward(engine(gradients(engine, step, bad=step == 2)))
            streams.events.clear()
            with (
                inside.watching_step(engine, lambda: streams.events.append(("begin",))),
                inside.watching_update(engine, lambda: streams.events.append(("update",))),
            ):
                engine.step()
            names = [event[0] for event in streams.events if event[0] != "come after"]
            rows.append(names[names.index("begin") + 1 :])
        engine.destroy()
    return rows


WHO_READS: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "nobody": ({}, False, False),
    "hooks": ({}, True, False),
    "a torch optimizer": (CHANGES["torch optimizer"], False, False),
    "the update on the host": ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, False, False),
    "the keeper of checkpoints": ({}, False, True),
    "all": (CHANGES["torch optimizer"], True, True),
}


@pytest.mark.parametrize("who", WHO_READS)
def test_the_outcome_is_copied_once_and_before_the_update(ranks, tmp_path, who):
    """So the host that waits for a decision does not wait for the update and the gathers that follow it."""
    changes, hooked, keeps = WHO_READS[who]
    config = config_for(2, **{"optimizer": ADAM, **{k: v for k, v in changes.items() if k != "zero_optimization"}})
    config["zero_optimization"] |= changes.get("zero_optimization", {})
    for rows in ranks(2).run(_around_the_decision, config, hooked, str(tmp_path) if keeps else ""):
        for row in rows:
            update = row.index("update")
            assert row[:update].count("copy") == 1
            if who != "the update on the host":  # where parameters travel to the device afterwards
                assert "copy" not in row[update:]
            assert ("wait" in row) == (who not in ("nobody", "the keeper of checkpoints"))


def test_outcomes_that_nobody_has_read_keep_their_values():
    """A host that is ahead has several; later steps write none of them."""
    streams = LateStreams()
    controller = StepController(LossScaler(False, 1.0, 1.0, 1000, 2, False), streams)
    pending = []
    for step in range(4):
        controller.add_loss(torch.tensor(float(step), dtype=torch.float32))
        controller.begin(0)[:] = 4.0**step
        controller.decide(mean=1.0, clip=0.0)
        pending.append(controller.outcome())
        controller.forget_told()
    assert len(set(map(id, pending))) == streams.copies == 4
    for step in (2, 0, 3, 1):
        outcome = pending[step].wait()
        assert (outcome.control.step, outcome.control.grad_norm, outcome.loss) == (step + 1, 2.0**step, step)
        assert pending[step].wait() is outcome


# -- runs that only skip


def _runs_into_the_limit(config: dict[str, Any], late: bool) -> tuple[int, str, int]:
    """In which step() the error comes, its text, and the number of skips; then trains on."""
    with on_late_streams() if late else nullcontext():
        engine = partita.Engine(model=Dictated(), config=config)
        when, message = 0, ""
        for step in range(20):
            engine.backward(engine(gradients(engine, step, bad=True)))
            try:
                engine.step()
            except FloatingPointError as error:
                when, message = step + 1, str(error)
                break
        skipped = engine.skipped_steps
        clean = partita.Engine(model=Dictated(), config=config)
        for each in (engine, clean):
            take_step(each, dictate(5))
        with whole(engine), whole(clean):
            for name, parameter in clean.module.named_parameters():
                assert torch.equal(parameter, dict(engine.module.named_parameters())[name]), f"{name} after the error"
    return when, message, skipped


LIMITS: dict[str, dict[str, Any]] = {
    "limit 1": {"max_consecutive_skipped_steps": 1},
    "limit 3": {"max_consecutive_skipped_steps": 3},
    "limit 3 in bf16": {"max_consecutive_skipped_steps": 3, **SPLIT},
    "at minimum": {"fp16": {"enabled": True, "initial_scale_power": 2, "hysteresis": 1}},
}


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("stage", STAGES)
def test_the_error_comes_one_step_later_on_all_ranks(ranks, stage, limit):
    """N2: the same text, with the guilty rank and parameter of the step that it is about; training may go on."""
    config = config_for(stage, optimizer=ADAM, **LIMITS[limit])
    usual, late = (ranks(2).run(_runs_into_the_limit, config, is_late) for is_late in (False, True))
    for (when, message, skipped), (usual_when, usual_message, usual_skipped) in zip(late, usual, strict=True):
        assert usual_message
        assert "rank 1, first in parameter 'c'" in message
        assert message == usual_message
        assert when == usual_when + 1
        assert skipped == usual_skipped


# -- gradients of several streams


def _packs(stage: int, overlap: bool) -> list[tuple[set[str], set[str], bool]]:
    """For each packed unit: the streams that its gradients were made on, those that packing came after, and whether
    those were told of all gradients that were read, and packing came after all packing before it."""
    config = config_for(stage, optimizer=ADAM, gradient_accumulation_steps=2)
    config["zero_optimization"]["overlap_comm"] = overlap
    with on_late_streams() as streams:
        engine = partita.Engine(model=Dictated(), config=config)
        rows: list[tuple[set[str], set[str], bool]] = []
        made_on: dict[str, str] = {}

        def work_on(name: str) -> None:
            streams.stream = made_on[name] = f"stream {'abcde'.index(name) % 3} of backward {backward}"

        backward = 0
        for name, parameter in engine.module.named_parameters():
            parameter.register_hook(lambda _grad, name=name: work_on(name))
        with inside.watching_packs(_watch(streams, made_on, rows)):
            for backward in range(6):
                engine.backward(engine(gradients(engine, backward, bad=False)))
                streams.stream = "main"
                engine.step()
        engine.destroy()
    return rows


def _watch(streams: LateStreams, made_on: dict[str, str], rows: list[Any]) -> inside.PackWatch:
    def begins(unit: Unit) -> Callable[[], None]:
        grads = {p.grad.data_ptr() for p in unit.parameters if p.grad is not None}
        streams.events.clear()

        def packs() -> None:
            after = [event for event in streams.events if event[0] == "come after" and event[2]]
            expected = {made_on[slot.name] for slot in unit.layout.slots}
            told = all(grads <= set(event[2]) for event in after)
            in_order = set(range(len(rows))) <= streams.known[streams.stream]
            streams.known[streams.stream].add(len(rows))
            rows.append((expected, {event[1] for event in after}, told and in_order))

        return packs

    return begins


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_read_after_the_streams_that_made_them(ranks, stage, overlap):
    """G2: and only those of this backward; the allocator hears of every gradient that another stream reads; buffers are
    used by one stream after the other."""
    for rows in ranks(2).run(_packs, stage, overlap):
        assert len(rows) >= 6 * 3
        assert any(len(expected) > 1 for expected, _, _ in rows)
        for expected, after, told_and_in_order in rows:
            assert after == expected
            assert told_and_in_order
