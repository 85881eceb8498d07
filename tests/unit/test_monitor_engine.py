"""What engines record of their steps: values, tokens, operations, phases; skips, resuming, log(), a late outcome."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import partita
import pytest
import torch
from late_streams import on_late_streams
from partita import ConfigError
from partita.nn.functional import linear_cross_entropy
from pipelines import Shape, config_for, micro_batch
from recorded import JOB, everywhere, own_rows, rows, scalars, table
from small_models import Regression, config, inputs, seeded
from torch import Tensor, nn

ALWAYS = {"step", "samples", "time", "loss", "lr", "grad_norm", "skipped_steps"}
ALWAYS |= {"memory_now_bytes", "memory_peak_bytes"}
RATES = {"step_ms", "samples_per_s", "flops_per_s"}
LATE = pytest.mark.parametrize("late", [False, True], ids=["cpu", "as on a GPU"])


def engine_of(folder: Path, make: Any = Regression, **changes: Any) -> partita.Engine:
    return partita.Engine(seeded(make), config=config(**everywhere(folder) | changes))


def train(engine: partita.Engine, steps: range) -> list[float]:
    losses = []
    for step in steps:
        for _ in range(engine.gradient_accumulation_steps()):
            loss = engine(inputs(step, 2))
            losses.append(engine.backward(loss).item())
            engine.step()
    return losses


# -- values


@LATE
def test_every_step_is_recorded_once_with_its_values(tmp_path: Path, late: bool):
    with on_late_streams() if late else nullcontext():
        engine = engine_of(tmp_path, scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 4}})
        losses, norms = [], []
        for step in range(4):
            losses += train(engine, range(step, step + 1))
            norms.append(engine.get_global_grad_norm())
        last_lr = engine.get_lr()[0]
        engine.destroy()
    found = rows(tmp_path)
    assert [(row["step"], row["samples"]) for row in found] == [(1, 2), (2, 4), (3, 6), (4, 8)]
    assert [row["loss"] for row in found] == pytest.approx(losses)
    assert [row["grad_norm"] for row in found] == pytest.approx(norms)
    assert found[-1]["lr"] == last_lr > found[1]["lr"] > 0
    assert found[0].keys() == ALWAYS
    assert found[1].keys() == ALWAYS | RATES  # rates are those since the row before
    assert all(row["memory_peak_bytes"] >= row["memory_now_bytes"] > 1e7 for row in found)
    assert all(row["samples_per_s"] * row["step_ms"] == pytest.approx(2e3) for row in found[1:])
    shown = scalars(tmp_path / "board" / JOB)["Train/Samples/train_loss"]
    assert shown == [(2 * step, pytest.approx(loss)) for step, loss in enumerate(losses, 1)]
    assert table(tmp_path / "tables" / JOB, "Train_Samples_lr")[1][-1] == (8, last_lr)


@LATE
def test_skipped_steps_of_float16_are_recorded_with_the_scale(tmp_path: Path, late: bool):
    fp16 = {"enabled": True, "initial_scale_power": 4, "hysteresis": 1}
    with on_late_streams() if late else nullcontext():
        engine = engine_of(tmp_path, Poisoned, fp16=fp16)
        for step in range(4):
            engine.backward(engine(inputs(step, 2), poison=step in (1, 2)))
            engine.step()
        engine.destroy()
    found = rows(tmp_path)
    assert [row["skipped_steps"] for row in found] == [0, 1, 2, 2]
    assert [row["loss_scale"] for row in found] == [16, 8, 4, 4]
    assert [row["grad_norm"] is None for row in found] == [False, True, True, False]


class Poisoned(Regression):
    def forward(self, x: Tensor, poison: bool = False) -> Tensor:
        return super().forward(x) * (float("inf") if poison else 1.0)


def test_param_groups_have_a_learning_rate_each(tmp_path: Path):
    model = seeded()
    groups = [{"params": model.first.parameters(), "lr": 0.1}, {"params": model.second.parameters(), "lr": 0.2}]
    engine = partita.Engine(model, config=config(**everywhere(tmp_path)), model_parameters=groups)
    train(engine, range(1))
    engine.destroy()
    assert [rows(tmp_path)[0][name] for name in ("lr", "lr_1")] == [0.1, 0.2]


def test_a_loss_that_the_engine_never_saw_is_not_recorded(tmp_path: Path):
    engine = engine_of(tmp_path)
    engine(inputs()).backward()
    engine.step()
    engine.destroy()
    assert rows(tmp_path)[0].keys() == ALWAYS - {"loss"}


def test_an_interval_records_means_of_its_steps(tmp_path: Path):
    engine = engine_of(tmp_path, monitor={"dir": str(tmp_path), "interval_steps": 3})
    train(engine, range(7))
    engine.destroy()
    assert [row["step"] for row in rows(tmp_path)] == [3, 6]


# -- tokens and operations


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = self.head(self.embedding(input_ids))
        return nn.functional.cross_entropy(logits.flatten(0, 1), input_ids.flatten())


def rate_times_seconds(row: dict[str, Any], name: str) -> float:
    return row[name] * row["step_ms"] / 1e3


@LATE
@pytest.mark.parametrize("way", ["positional", "by name"])
def test_tokens_are_those_of_all_micro_batches_whatever_their_lengths(tmp_path: Path, way: str, late: bool):
    with on_late_streams() if late else nullcontext():
        engine = engine_of(tmp_path, Words, gradient_accumulation_steps=2)
        for _ in range(3):
            for length in (5, 8):
                ids = torch.zeros(2, length, dtype=torch.int64)
                engine.backward(engine(ids) if way == "positional" else engine(labels=torch.zeros(2, 3), input_ids=ids))
                engine.step()
            with torch.no_grad():
                engine(torch.zeros(2, 100, dtype=torch.int64))  # an evaluation
        engine.backward(engine(torch.zeros(2, 100, dtype=torch.int64)))
        engine.zero_grad()
        engine.destroy()
    for row in rows(tmp_path)[1:]:
        assert rate_times_seconds(row, "tokens_per_s") == pytest.approx(2 * (5 + 8))
        # A product of [tokens, 6] and [6, 11], and twice as much in backward.
        assert rate_times_seconds(row, "flops_per_s") == pytest.approx(3 * 2 * 26 * 6 * 11)


def test_what_is_no_text_has_no_tokens_and_a_program_may_say_how_many(tmp_path: Path):
    for number, said in enumerate((None, 7)):
        engine = engine_of(tmp_path, monitor={"dir": str(tmp_path / str(number)), "tokens_per_sample": said})
        train(engine, range(2))
        engine.destroy()
    silent, told = (rows(tmp_path / name)[1] for name in "01")
    assert "tokens_per_s" not in silent
    assert rate_times_seconds(told, "tokens_per_s") == pytest.approx(2 * 7)


class Chunked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6, bias=False), nn.Linear(6, 11, bias=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        targets = torch.arange(len(x), dtype=torch.int64, device=x.device)
        return {"loss": linear_cross_entropy(self.body(x.view(len(x), -1)[:, :4]), self.head.weight, targets)}


def test_gradients_that_a_forward_computes_already_count_once(tmp_path: Path):
    engine = engine_of(tmp_path, Chunked)
    for _ in range(2):
        engine.backward(engine(torch.ones(2, 4))["loss"])
        engine.step()
    engine.destroy()
    assert rate_times_seconds(rows(tmp_path)[1], "flops_per_s") == pytest.approx(3 * 2 * 2 * (4 * 6 + 6 * 11))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 8, num_layers=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x.reshape(2, 1, 4).expand(2, 5, 4))[0].pow(2).mean()


def test_recurrent_layers_count_too(tmp_path: Path):
    """4 gates of 8, from an input of 4 and a state of 8, then from 8 and 8; 2 sequences of 5."""
    engine = engine_of(tmp_path, Recurrent)
    train(engine, range(2))
    engine.destroy()
    expected = 3 * 2 * (2 * 5) * 4 * 8 * ((4 + 8) + (8 + 8))
    assert rate_times_seconds(rows(tmp_path)[1], "flops_per_s") == pytest.approx(expected)


def test_mfu_is_the_share_of_the_peak_of_all_devices(tmp_path: Path):
    engine = engine_of(tmp_path, monitor={"dir": str(tmp_path), "peak_tflops": 2.0})
    train(engine, range(2))
    engine.destroy()
    row = rows(tmp_path)[1]
    assert row["mfu"] == pytest.approx(row["flops_per_s"] / 2e12)


@pytest.mark.parametrize(("stage", "compiled"), [(0, False), (3, False), (0, True)])
def test_counting_operations_changes_no_number(tmp_path: Path, stage: int, compiled: bool):
    losses = []
    for flops in (True, False):
        model = seeded()
        settings = config(
            zero_optimization={"stage": stage}, monitor={"dir": str(tmp_path / str(flops)), "flops": flops}
        )
        run = torch.compile(model, backend="eager") if compiled else model
        engine = partita.Engine(run, config=settings)
        losses.append(train(engine, range(3)))
        engine.destroy()
        assert ("flops_per_s" in rows(tmp_path / str(flops))[1]) == flops
    assert losses[0] == losses[1]


# -- phases


def test_phases_come_when_the_device_has_done_them_and_nobody_waits(tmp_path: Path):
    """LateStreams refuses times that are not there. The update of a step ends after its outcome is known."""
    with on_late_streams() as streams:
        engine = engine_of(tmp_path, wall_clock_breakdown=True, gradient_accumulation_steps=2, steps_per_print=1)
        train(engine, range(2))
        engine.backward(engine(inputs(0, 2)))  # the next step is under way
        engine.get_lr()
        engine.step()
        train(engine, range(3))
        streams.catch_up()
        engine.destroy()
    found = rows(tmp_path)
    phases = {"forward_ms", "backward_ms", "update_ms"}
    assert [phases <= row.keys() for row in found] == [False, *[True] * (len(found) - 1)]
    assert all(row["forward_ms"] > 0 for row in found[1:])


def test_an_evaluation_is_no_part_of_the_forwards(tmp_path: Path):
    engine = engine_of(tmp_path, wall_clock_breakdown=True)
    train(engine, range(1))
    with torch.no_grad():
        engine(inputs())
    train(engine, range(1, 3))
    engine.destroy()
    assert ["evaluation_ms" in row for row in rows(tmp_path)] == [False, True, False]


# -- going on


def test_a_run_that_resumes_from_an_earlier_checkpoint_has_each_step_once(tmp_path: Path):
    keeps = {"checkpoint": {"dir": str(tmp_path / "saved"), "interval_steps": 3}}
    engine = engine_of(tmp_path, **keeps)
    train(engine, range(5))  # saves after step 3
    engine.destroy()
    engine = engine_of(tmp_path, **keeps)
    assert engine.global_steps == 3
    engine.log({"back": 1})
    train(engine, range(3, 6))
    engine.destroy()
    found = own_rows(tmp_path)
    assert [(row["step"], row["samples"]) for row in found] == [(s, 2 * s) for s in range(1, 7)]
    assert "step_ms" not in found[3]  # nobody knows when step 3 ended
    assert [row["step"] for row in rows(tmp_path) if "back" in row] == [3]
    assert [x for x, _ in table(tmp_path / "tables" / JOB, "Train_Samples_lr")[1]] == [2 * s for s in range(1, 7)]


def test_a_run_that_goes_back_in_mid_program_has_each_step_once(tmp_path: Path):
    engine = engine_of(tmp_path)
    train(engine, range(2))
    engine.save_checkpoint(tmp_path / "saved")
    train(engine, range(2, 4))
    engine.load_checkpoint(tmp_path / "saved")
    train(engine, range(2, 5))
    engine.destroy()
    found = own_rows(tmp_path)
    assert [(row["step"], row["samples"]) for row in found] == [(s, 2 * s) for s in range(1, 6)]
    assert ["step_ms" in row for row in found] == [False, True, False, True, True]


def test_who_goes_back_to_evaluate_loses_no_later_step(tmp_path: Path):
    engine = engine_of(tmp_path)
    train(engine, range(2))
    engine.save_checkpoint(tmp_path / "best")
    train(engine, range(2, 5))
    engine.load_checkpoint(tmp_path / "best")
    engine.log({"test_acc": 0.5})
    engine.destroy()
    assert [row["step"] for row in own_rows(tmp_path)] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in rows(tmp_path) if "test_acc" in row] == [2]
    assert len(table(tmp_path / "tables" / JOB, "Train_Samples_lr")[1]) == 5


def test_an_engine_that_nobody_destroys_writes_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("partita.monitor.writer.INTERVAL_S", 1e3)
    engine = engine_of(tmp_path)
    train(engine, range(3))
    del engine
    gc.collect()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


# -- values of the program


@LATE
def test_what_a_program_logs_stands_at_the_present_step(tmp_path: Path, late: bool):
    with on_late_streams() if late else nullcontext():
        engine = engine_of(tmp_path)
        engine.log({"before": 1})
        for step in range(3):
            train(engine, range(step, step + 1))
            engine.log({"val_loss": torch.tensor([0.5 * step]), "Eval/acc": step})
        engine.destroy()
    logged = [row for row in rows(tmp_path) if "val_loss" in row]
    assert [(row["step"], row["samples"], row["val_loss"], row["Eval/acc"]) for row in logged] == [
        (1, 2, 0.0, 0),
        (2, 4, 0.5, 1),
        (3, 6, 1.0, 2),
    ]
    assert [(row["step"], row["before"]) for row in rows(tmp_path) if "before" in row] == [(0, 1)]
    assert scalars(tmp_path / "board" / JOB)["val_loss"] == [(2, 0.0), (4, 0.5), (6, 1.0)]
    assert table(tmp_path / "tables" / JOB, "Eval_acc") == (["step", "acc"], [(2, 0), (4, 1), (6, 2)])


@pytest.mark.parametrize(
    ("values", "error", "says"),
    [
        ({"": 1}, TypeError, "'' is no name"),
        ({3: 1}, TypeError, "3 is no name"),
        ({"step": 1}, ValueError, "'step' is what every row has"),
        ({"acc": "0.5"}, TypeError, "'acc' is a str: give one number"),
        ({"acc": torch.zeros(2)}, TypeError, "'acc' is a Tensor: give one number"),
        ({"acc": torch.zeros(0)}, TypeError, "'acc' is a Tensor: give one number"),
        ({"acc": torch.tensor(1j)}, TypeError, "'acc' is a Tensor: give one number"),
        ({"acc": np.zeros(3)}, TypeError, "'acc' is a ndarray: give one number"),
        ({"acc": 10**400}, TypeError, "'acc' is a int: give one number"),
    ],
)
@pytest.mark.parametrize("watched", [True, False])
def test_what_cannot_be_logged_is_named(tmp_path: Path, watched: bool, values: Any, error: type[Exception], says: str):
    engine = partita.Engine(seeded(), config=config(**everywhere(tmp_path) if watched else {}))
    with pytest.raises(error, match=says):
        engine.log(values)
    engine.log({"acc": 0.5})  # without a sink, too
    engine.destroy()
    with pytest.raises(RuntimeError, match=r"log\(\) was called after engine.destroy\(\)"):
        engine.log({"acc": 0.5})
    with pytest.raises(RuntimeError, match=r"waits\(\) was called after engine.destroy\(\)"):
        engine.waits()


# -- pipelines, and what is refused


def test_a_pipeline_records_the_same(tmp_path: Path):
    count = 4
    engine, *_ = partita.initialize(model=Shape().module(1), config=config_for(count, **everywhere(tmp_path)))
    losses = [engine.train_batch(iter([micro_batch(s, m) for m in range(count)])).item() for s in range(3)]
    engine.log({"val_loss": 2.5})
    engine.destroy()
    found = own_rows(tmp_path)
    assert [row["loss"] for row in found] == pytest.approx(losses)
    assert [rate_times_seconds(row, "tokens_per_s") for row in found[1:]] == pytest.approx([count * 3 * 5] * 2)
    assert all(row["flops_per_s"] > 0 for row in found[1:])
    assert scalars(tmp_path / "board" / JOB)["val_loss"] == [(3 * 3 * count, 2.5)]


def test_the_file_of_records_must_not_be_something_else(tmp_path: Path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"monitor.dir: cannot be written: .* is a folder"):
        engine_of(tmp_path)


def test_an_engine_whose_place_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path):
    (tmp_path / "file").touch()
    model = seeded()
    with pytest.raises(ConfigError, match="csv_monitor: cannot be written"):
        partita.Engine(model, config=config(csv_monitor={"enabled": True, "output_path": str(tmp_path / "file")}))
    partita.Engine(model, config=config()).destroy()
