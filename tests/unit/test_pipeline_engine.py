"""A pipeline of one rank: what its engine takes, and what it refuses and says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import partita
import pytest
import torch
from partita import ConfigError, LifecycleError, PipelineEngine
from partita.pipeline import PipelineModule, ScheduleError, by_name, to_csv, to_text
from pipelines import WORDS, Shape, config_for, cross_entropy, micro_batch
from torch import nn
from torch.utils.data import DataLoader

COUNT = 4


def engine_of(**changes: Any) -> PipelineEngine:
    options = changes.pop("options", {})
    engine, *_ = partita.initialize(model=Shape().module(1), config=config_for(COUNT, **changes), **options)
    assert isinstance(engine, PipelineEngine)
    return engine


def batches(step: int = 0) -> Iterator[Any]:
    return iter([micro_batch(step, m) for m in range(COUNT)])


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"zero_optimization": {"stage": 3}}, ConfigError, "zero_optimization.stage = 3: .*use stage 0, 1 or 2"),
        ({"activation_checkpointing": {"enabled": True}}, ConfigError, "pipeline.activation_checkpoint_interval"),
        ({"pipeline": {"schedule": "1f2b"}}, ScheduleError, "no schedule '1f2b'.*1f1b.*nor is there such a file"),
        ({"pipeline": {"schedule": "forward-only"}}, ScheduleError, "has no backwards"),
        ({"pipeline": {"schedule": "1f1b", "chunks": 2}}, ScheduleError, "1f1b has 1 stage per rank, and chunks = 2"),
        ({"pipeline": {"schedule": "interleaved", "chunks": 9}}, ValueError, "8 layers"),
        ({"pipeline": {"shedule": "1f1b"}}, ConfigError, "pipeline.shedule.*schedule"),
    ],
)
def test_what_a_pipeline_cannot_do_is_named(changes, error, says):
    with pytest.raises(error, match=f"(?s){says}"):
        engine_of(**changes)


@pytest.mark.parametrize("write", [to_text, to_csv])
def test_a_schedule_may_be_a_file(tmp_path: Path, write):
    path = tmp_path / "schedule.txt"
    path.write_text(write(by_name("zb-v", 1, COUNT)))
    engine = engine_of(pipeline={"schedule": str(path)})
    assert engine.schedule == by_name("zb-v", 1, COUNT)
    assert engine.train_batch(batches()).item() > 0
    engine.destroy()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (to_text(by_name("1f1b", 1, 3)), "of 3 micro-batches, and gradient_accumulation_steps = 4"),
        (to_text(by_name("1f1b", 2, 4)), "of 2 ranks, and PipelineModule has num_stages = 1"),
        ("0F0,0B0,0B0", "has 0B0 twice"),
        ("nonsense", "'nonsense' is no action"),
    ],
)
def test_unfit_files_are_refused(tmp_path: Path, text, says):
    path = tmp_path / "schedule.txt"
    path.write_text(text)
    with pytest.raises(ScheduleError, match=says):
        engine_of(pipeline={"schedule": str(path)}, gradient_accumulation_steps=1 if "twice" in says else COUNT)


def test_calls_of_the_other_engine_are_refused():
    engine = engine_of()
    for call in (lambda: engine(torch.zeros(1)), lambda: engine.backward(torch.zeros(1)), engine.step):
        with pytest.raises(LifecycleError, match=r"engine\.train_batch\(iterator\)"):
            call()
    engine.destroy()
    with pytest.raises(LifecycleError, match="DESTROYED"):
        engine.train_batch(batches())


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (None, ValueError, r"train_batch\(\) needs an iterator"),
        (iter([]), ValueError, "ended after 0 of the 4"),
        (iter([torch.zeros(3)] * 4), TypeError, r"a micro-batch is a Tensor: a pipeline needs pairs"),
        (iter([(1, 2, 3)] * 4), TypeError, r"a micro-batch is a tuple of 3"),
    ],
)
def test_data_that_are_no_pairs_are_refused_and_nothing_is_lost(data, error, says):
    engine, undisturbed = engine_of(), engine_of()
    with pytest.raises(error, match=says):
        engine.train_batch(data)
    assert engine.train_batch(batches()) == undisturbed.train_batch(batches())
    for one in (engine, undisturbed):
        one.destroy()


def test_layers_that_fail_end_the_engine():
    engine = engine_of()
    with pytest.raises(
        partita.pipeline.PipelineError, match=r"rank 0, stage 0, micro-batch 0, forward \(0F0\): IndexErr"
    ):
        engine.train_batch(iter([(torch.full((3, 5), WORDS), torch.zeros(3, 5).long())] * 4))
    with pytest.raises(LifecycleError, match="has failed and cannot go on"):
        engine.eval_batch(batches())
    engine.destroy()


@pytest.mark.parametrize("has_optimizer", [False, True])
def test_a_model_that_is_not_trained_is_evaluated_only(has_optimizer):
    model = Shape().module(1).requires_grad_(not has_optimizer)
    config = config_for(COUNT)
    engine, *_ = partita.initialize(model=model, config=config if has_optimizer else {**config, "optimizer": None})
    assert engine.eval_batch(batches()).item() > 0
    with pytest.raises(RuntimeError, match=r"nothing is trained: there is no optimizer .* or every parameter"):
        engine.train_batch(batches())
    with pytest.raises(ValueError, match="num_micro_batches = 0: give 1 or more"):
        engine.eval_batch(batches(), 0)
    engine.destroy()


def _no_loss(outputs: Any, labels: Any) -> Any:
    return outputs


def test_the_loss_is_a_scalar():
    model = PipelineModule([nn.Embedding(WORDS, 4)], 1, loss_fn=_no_loss)
    engine, *_ = partita.initialize(model=model, config=config_for(1))
    with pytest.raises(
        partita.pipeline.PipelineError, match=r"gives a tensor of shape \(3, 5, 4\): give PipelineModule"
    ):
        engine.train_batch(iter([micro_batch(0, 0)]))
    engine.destroy()


def test_data_sets_and_loaders_are_read():
    inputs, labels = micro_batch(0, 0, sizes=(24,))
    data = [(inputs[i], labels[i]) for i in range(24)]
    engine = engine_of(options={"training_data": data})
    assert engine.train_batch().item() > 0 and engine.dataloader.samples == 12
    assert engine.train_batch(DataLoader(data, batch_size=3)).item() > 0  # type: ignore[arg-type]
    whole = (torch.stack([x for x, _ in data[:12]]), torch.stack([y for _, y in data[:12]]))
    assert engine.train_batch(whole).item() > 0
    assert engine.eval_batch(whole).item() > 0
    engine.destroy()


def test_schedules_of_learning_rates_and_optimizers_are_the_programs():
    def adagrad(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adagrad(parameters, lr=0.1)

    options = {"optimizer": adagrad, "lr_scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5)}
    engine = engine_of(optimizer=None, options=options)
    for step in range(3):
        engine.train_batch(batches(step))
    assert engine.get_lr() == [0.1 / 8] and engine.global_steps == 3 and engine.global_samples == 36
    assert [span.action for span in engine.timeline()] == list(engine.schedule.actions[0])
    engine.destroy()


def test_the_last_layer_may_give_the_loss():
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(WORDS, WORDS)

        def forward(self, inputs: Any) -> Any:
            ids, labels = inputs
            return cross_entropy(self.words(ids), labels)

    engine, *_ = partita.initialize(model=PipelineModule([Loss()], 1), config=config_for(2))
    losses = [engine.train_batch(iter([(micro_batch(0, m), None) for m in range(2)])).item() for _ in range(4)]
    assert losses[-1] < losses[0]
    engine.destroy()


def test_activation_checkpoints_are_the_configs():
    model = Shape().module(1)
    engine, *_ = partita.initialize(
        model=model, config=config_for(COUNT, pipeline={"activation_checkpoint_interval": 2})
    )
    assert model.activation_checkpoint_interval == 2
    engine.destroy()
