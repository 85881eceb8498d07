"""Pipelines that save beside training, encrypted, on their own, with frozen layers; and that go on in another split."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import partita
import pytest
import torch
from partita.checkpoint import CheckpointError, checkpoints
from partita.model import Accumulation, CommonAccumulation
from partita.pipeline import LayerSpec, PipelineModule, TiedLayerSpec
from partita.units import stage_policy
from splits import (
    REPLICA,
    SPLITS,
    config_for,
    counts_of,
    engine_for,
    loss_of,
    pieces_of,
    take_steps,
    whole,
)
from torch import Tensor, nn

KEY = "PARTITA_TEST_KEY"
SEALED = {"encryption": {"key_env": KEY}}
BIG = 600  # a frozen layer has a file of its own


def run(ranks: Any, split: str, function: Any, *args: Any) -> list[Any]:
    return list(ranks(SPLITS[split].ranks).run(function, *args))


def test_all_parts_take_the_count_of_micro_batches():
    parts = [Accumulation(4, stage_policy(1)) for _ in range(2)]
    CommonAccumulation(parts).load_state_dict({"micro_steps": 9, "micro_batches": 3})
    assert [part.micro_steps for part in parts] == [12, 12]


def _saves_beside(folder: str, config: dict[str, Any], split: str) -> Any:
    os.environ[KEY] = bytes(range(32)).hex()
    engine = engine_for(config, split, 1, tied=True)
    take_steps(engine, 2)
    engine.save_checkpoint(folder, "beside")
    pieces = pieces_of(engine)
    take_steps(engine, 2)
    assert engine.wait_for_save() is None or engine.save_under_way is None
    engine.destroy()
    return pieces


def _loads(folder: str, config: dict[str, Any], split: str) -> Any:
    os.environ[KEY] = bytes(range(32)).hex()
    engine = engine_for(config, split, 2, tied=True)
    engine.load_checkpoint(folder, "beside")
    pieces = pieces_of(engine)
    engine.destroy()
    return pieces


@pytest.mark.parametrize(("source", "target"), [("2 x 2", "2 x 1, V"), ("2 x 1, V", "plain x 2")])
@pytest.mark.parametrize("keeps", [{}, SEALED], ids=["plain", "sealed"])
def test_steps_during_a_save_are_not_in_it(ranks, tmp_path, source, target, keeps):
    config = config_for(source, 1, "bf16", checkpoint={"async_save": True, **keeps})
    saved = whole(run(ranks, source, _saves_beside, str(tmp_path), config, source), tied=True)
    loaded = whole(
        run(ranks, target, _loads, str(tmp_path), config_for(target, 2, "bf16", checkpoint=keeps), target), tied=True
    )
    assert saved.keys() == loaded.keys()
    assert [key for key in saved if not saved[key].equal(loaded[key])] == []


def _goes_on(config: dict[str, Any], split: str, steps: int) -> Any:
    engine = engine_for(config, split, 3)
    begin, pieces, resumed = counts_of(engine), pieces_of(engine), engine.resumed_from
    losses = take_steps(engine, steps)
    end, last = counts_of(engine), pieces_of(engine)
    engine.destroy()
    return begin, pieces, None if resumed is None else resumed.name, losses, end, last


def test_a_run_goes_on_of_itself_with_fewer_ranks(ranks, tmp_path):
    """2 x 2, then a pipeline of 2, then one process."""
    keeps = {"dir": str(tmp_path), "interval_steps": 2, "keep_last": 2, "verify": True}
    before: Any = None
    for split in ("2 x 2", "2 x 1, V", "plain x 1"):
        told = run(ranks, split, _goes_on, config_for(split, 1, "fp32", checkpoint=keeps), split, 2)
        if before is not None:
            assert [one[0] for one in told] == [before[0][4]] * len(told)
            saved, found = whole([one[5] for one in before]), whole([one[1] for one in told])
            assert [key for key in saved if not saved[key].equal(found[key])] == []
        before = told
    assert {one[2] for one in before} == {"global_step4"}
    assert [found.tag for found in checkpoints(tmp_path)] == ["global_step6", "global_step4"]


def _frozen_below(folder: str, pipe: int) -> list[int]:
    """The inode of the frozen layer's file, in two checkpoints."""
    torch.manual_seed(0)
    layers = [nn.Linear(BIG, 2), nn.Linear(2, BIG), nn.Linear(BIG, BIG).requires_grad_(False), nn.Linear(BIG, 2)]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "steps_per_print": 0,
    }
    model = PipelineModule(layers, pipe, loss_fn=loss_of, partition_method="uniform")
    engine, *_ = partita.initialize(model=model, config=config)
    found = []
    for tag in ("first", "second"):
        engine.train_batch(iter([(torch.ones(2, BIG), torch.zeros(2, 2))]))
        engine.save_checkpoint(folder, tag)
        found += [path.stat().st_ino for path in Path(folder, tag).glob("*.safetensors") if path.stat().st_nlink > 1]
    engine.destroy()
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_a_frozen_layer_of_the_last_stage_is_written_once(ranks, tmp_path, size):
    told = ranks(size).run(_frozen_below, str(tmp_path), 2)
    assert {len(found) for found in told} == {1}
    assert sum(path.stat().st_nlink == 2 for path in (tmp_path / "first").glob("*.safetensors")) == 1


def _without_parameters(folder: str, pipe: int, frozen: bool, load: bool) -> tuple[dict[str, Tensor], list[float]]:
    torch.manual_seed(int(load))
    first = nn.Linear(7, 7).requires_grad_(False) if frozen else nn.Tanh()
    layers = [first, nn.Tanh(), nn.Linear(7, 7), nn.Linear(7, 7)]
    model = PipelineModule(layers, pipe, loss_fn=loss_of, partition_method="uniform")
    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW"}, "steps_per_print": 0}
    engine, *_ = partita.initialize(model=model, config=config)
    batch = (torch.ones(2, 7), torch.zeros(2, 7))
    engine.train_batch(iter([batch]))
    (engine.load_checkpoint if load else engine.save_checkpoint)(folder, "saved")
    state = engine.module_state_dict()
    losses = [engine.train_batch(iter([batch])).item() for _ in range(2)]
    engine.destroy()
    return state, losses


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("source", "target"), [(2, 1), (1, 2)])
def test_a_rank_may_have_nothing_that_is_trained(ranks, tmp_path, source, target, frozen):
    saved = ranks(source).run(_without_parameters, str(tmp_path), source, frozen, False)
    states = {name: value for state, _ in saved for name, value in state.items()}
    for state, losses in ranks(target).run(_without_parameters, str(tmp_path), target, frozen, True):
        assert losses == saved[0][1]
        assert all(torch.equal(value, states[name]) for name, value in state.items())


def _goes_back(config: dict[str, Any], split: str) -> tuple[list[float], list[float]]:
    engine = engine_for(config, split, 1, tied=True)
    take_steps(engine, 1)
    snapshot = engine.train_state().copy()
    first = take_steps(engine, 2)
    engine.train_state().restore(snapshot)
    second = take_steps(engine, 2)
    engine.destroy()
    return first, second


@pytest.mark.parametrize("split", ["2 x 1, V", "2 x 2"])
def test_a_training_state_is_restored_in_memory(ranks, split):
    for first, second in run(ranks, split, _goes_back, config_for(split, 1, "split"), split):
        assert first == second


class Kept(nn.Module):
    """A weight and a buffer that several layers have."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(7))
        self.register_buffer("shift", torch.rand(7))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.shift


def _shares_buffers(folder: str, seed: int, pipe: int, load: bool) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    specs = [TiedLayerSpec("kept", Kept), LayerSpec(nn.Linear, 7, 7), TiedLayerSpec("kept", Kept)]
    model = PipelineModule(specs, pipe, loss_fn=loss_of, partition_method="uniform")
    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW"}, "steps_per_print": 0}
    engine, *_ = partita.initialize(model=model, config=config)
    engine.train_batch(iter([(torch.ones(2, 7), torch.zeros(2, 7))]))
    (engine.load_checkpoint if load else engine.save_checkpoint)(folder, "shared")
    state = engine.module_state_dict()
    engine.destroy()
    return state


@pytest.mark.parametrize(("source", "target"), [(1, 2), (2, 1), (2, 3), (3, 2)])
def test_a_buffer_that_layers_share_is_loaded_where_they_are_apart(ranks, tmp_path, source, target):
    """The same module in one stage, and copies of it in several."""
    states: dict[str, Tensor] = {}
    for state in ranks(source).run(_shares_buffers, str(tmp_path), 1, source, False):
        states.update(state)
    for state in ranks(target).run(_shares_buffers, str(tmp_path), 2, target, True):
        for name, value in state.items():
            assert torch.equal(value, states[name]), name


def _freezes(folder: str, config: dict[str, Any], split: str) -> list[float]:
    """The last layer stands still for a step: its own count of steps is another one."""
    engine = engine_for(config, split, 1)
    last = [p for name, p in engine.module.named_parameters() if name == REPLICA]
    for still in (False, True, False):
        for parameter in last:
            parameter.requires_grad_(not still)
        take_steps(engine, 1)
    engine.save_checkpoint(folder, "frozen")
    losses = take_steps(engine, 2)
    engine.destroy()
    return losses


def _said(folder: str, config: dict[str, Any], split: str, strict: bool) -> list[str]:
    """What a load says in the log."""
    heard: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = heard.append  # type: ignore[method-assign]
    logger = logging.getLogger("partita")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    engine = engine_for(config, split, 2)
    heard.clear()
    engine.load_checkpoint(folder, "saved", load_module_strict=strict)
    engine.destroy()
    logger.removeHandler(handler)
    return [record.getMessage() for record in heard]


@pytest.mark.parametrize("strict", [True, False])
def test_layers_of_other_ranks_are_not_told_as_missing(ranks, tmp_path, strict):
    run(ranks, "2 x 1, V", _saves, str(tmp_path), config_for("2 x 1, V", 1, "fp32"), "2 x 1, V")
    first, second = run(ranks, "2 x 1", _said, str(tmp_path), config_for("2 x 1", 1, "fp32"), "2 x 1", strict)
    assert [text.partition(",")[0] for text in first] == [f"loaded '{tmp_path / 'saved'}'"]
    assert second == []


def _goes_on_from(folder: str, config: dict[str, Any], split: str, tag: str, **wanted: bool) -> list[float] | str:
    engine = engine_for(config, split, 2)
    try:
        engine.load_checkpoint(folder, tag, **wanted)
        return take_steps(engine, 2)
    except CheckpointError as error:
        return str(error)
    finally:
        engine.destroy()


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize(
    ("source", "target"), [("2 x 1, V", "1 x 1"), ("1 x 1, 2 chunks", "2 x 1"), ("plain x 1", "2 x 1, V")]
)
def test_a_parameter_that_was_frozen_goes_on_in_another_split(ranks, tmp_path, source, target, optimizer):
    config = config_for(source, 1, "fp32", optimizer)
    losses = run(ranks, source, _freezes, str(tmp_path), config, source)
    config = config_for(target, 0, "fp32", optimizer)
    for found in run(ranks, target, _goes_on_from, str(tmp_path), config, target, "frozen"):
        assert found == pytest.approx(losses[0], rel=1e-6)


def _saves(folder: str, config: dict[str, Any], split: str) -> None:
    engine = engine_for(config, split, 1)
    take_steps(engine, 1)
    engine.save_checkpoint(folder, "saved")
    engine.destroy()


def _without_states(folder: str, config: dict[str, Any], split: str) -> list[float] | str:
    return _goes_on_from(folder, config, split, "saved", load_optimizer_states=False)


def test_another_optimizer_is_refused_on_all_ranks_or_begins_anew(ranks, tmp_path):
    run(ranks, "2 x 2", _saves, str(tmp_path), config_for("2 x 2", 1, "fp32", "AdamW"), "2 x 2")
    config = config_for("2 x 1, V", 1, "fp32", "SGD")
    said = run(ranks, "2 x 1, V", _goes_on_from, str(tmp_path), config, "2 x 1, V", "saved")
    assert len(set(said)) == 1
    assert "the optimizer of this run is SGD" in said[0]
    anew = run(ranks, "2 x 1, V", _without_states, str(tmp_path), config, "2 x 1, V")
    assert anew[0] == anew[1]
    assert len(anew[0]) == 2
