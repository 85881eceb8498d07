"""C3, C4, C8: what is damaged, missing or of something else is refused on all ranks alike, by name."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import partita
import pytest
import torch
from partita.checkpoint import CheckpointError
from resumed import Numbers, config_for, differences, engine_for, take_steps, train_and_save, whole_state
from torch import nn

CONFIG = config_for(2, 2, "split")  # every byte is needed
TAG = "global_step3"


@pytest.fixture(scope="module")
def saved(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one checkpoint."""
    folder = tmp_path_factory.mktemp("saved")
    ranks(2).run(train_and_save, str(folder), CONFIG)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A folder with one checkpoint, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def _refused(folder: str, tag: str | None) -> tuple[str, list[str]]:
    """What the error says, and what of the engine's state has changed; the engine goes on."""
    engine = engine_for(CONFIG, seed=2)
    take_steps(engine, 1)
    before = whole_state(engine, "AdamW")
    with pytest.raises(CheckpointError) as raised:
        engine.load_checkpoint(folder, tag)
    changed = differences(whole_state(engine, "AdamW"), before)
    take_steps(engine, 1)
    engine.destroy()
    return str(raised.value), changed


def refused(ranks: Any, folder: Path, *words: str, tag: str | None = None) -> str:
    first, second = ranks(2).run(_refused, str(folder), tag)
    assert first == second
    message, changed = first
    assert changed == []
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message
    return str(message)


def flip(path: Path, at: float) -> int:
    """Changes one bit of a file, at this part of its length; returns where."""
    data = bytearray(path.read_bytes())
    place = int((len(data) - 1) * at)
    data[place] ^= 16
    path.write_bytes(data)
    return place


@pytest.mark.parametrize("at", [0.0, 0.4, 0.7, 1.0])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_flipped_bit_is_found(ranks, copy, name, at):
    """In a header or in values: the message has the file and the bytes, and the tensor where there is one."""
    flip(copy / TAG / name, at)
    message = refused(ranks, copy, str(copy / TAG / name), "bytes ", "saved")
    if at == 1.0 and name == "model.safetensors":
        assert "'tied.weight'" in message or "'layers" in message or "'one'" in message


DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "a file is missing": (lambda f: (f / TAG / "model.safetensors").unlink(), ("model.safetensors",)),
    "a file is shorter": (
        lambda f: (f / TAG / "optimizer.safetensors").open("r+b").truncate(9000),
        ("optimizer.safetensors", "9000 bytes"),
    ),
    "no manifest": (lambda f: (f / TAG / "manifest.json").unlink(), ("manifest.json", TAG)),
    "half a manifest": (
        lambda f: (f / TAG / "manifest.json").write_text((f / TAG / "manifest.json").read_text()[:300]),
        ("manifest.json",),
    ),
    "a newer format": (
        lambda f: (f / TAG / "manifest.json").write_text(
            json.dumps({**json.loads((f / TAG / "manifest.json").read_text()), "version": 7})
        ),
        ("version 7",),
    ),
    "no such tag": (lambda f: (f / "latest").write_text("global_step9"), ("'global_step9'", TAG)),
    "nothing is latest": (lambda f: (f / "latest").unlink(), ("latest", TAG)),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_not_whole_is_refused(ranks, copy, name):
    damage, words = DAMAGES[name]
    damage(copy)
    refused(ranks, copy, *words)


def test_a_missing_checkpoint_says_which_there_are(ranks, saved, tmp_path):
    refused(ranks, saved, "step9'", TAG, tag="step9")
    refused(ranks, tmp_path / "nothing", "is not there", str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    refused(ranks, tmp_path / "empty", str(tmp_path / "empty"))


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["state.json", "manifest.json", "model.safetensors", "optimizer.safetensors"])
def test_a_pickle_is_never_executed(ranks, copy, tmp_path, name):
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    (copy / TAG / name).write_bytes(bomb)
    (copy / TAG / "mp_rank_00_model_states.pt").write_bytes(bomb)
    refused(ranks, copy, name)
    assert not (tmp_path / "exploded").exists()


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(6, 61)
        self.layers = nn.ModuleList([nn.Linear(61, 61), nn.Linear(61, 7)])
        self.added = nn.Linear(7, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.added(self.layers[1](self.layers[0](self.frozen(x)))).square().mean()


def _of_another_model(folder: str, stage: int) -> tuple[str, bool, bool, int]:
    config = config_for(2, stage, "fp32")
    torch.manual_seed(5)
    engine = partita.Engine(Other(), train_data=Numbers(), config=config)
    with pytest.raises(CheckpointError) as raised:
        engine.load_checkpoint(folder)
    before = engine.module_state_dict()
    engine.load_checkpoint(folder, load_module_strict=False)
    after = engine.module_state_dict()
    kept = [name for name in before if torch.equal(before[name], after[name])]
    steps = engine.global_steps
    engine.train_batch()
    moved = engine.module_state_dict()["added.weight"] - after["added.weight"]
    # The first update of Adam is about the learning rate, whatever step the run is in.
    is_a_first_step = bool((moved.abs().max() - engine.get_lr()[0]).abs() < 0.3 * engine.get_lr()[0])
    engine.destroy()
    return (
        str(raised.value),
        kept == ["layers.1.weight", "layers.1.bias", "added.weight", "added.bias"],
        is_a_first_step,
        steps,
    )


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_another_model_is_refused_by_the_names_of_its_parameters(ranks, saved, stage):
    """load_module_strict=False loads what fits. What is new trains as in its first step."""
    for message, rest_is_kept, is_a_first_step, steps in ranks(2).run(_of_another_model, str(saved), stage):
        for words in ("'added.weight' is missing", "'layers.1.weight' has shape (61, 61), in the model (7, 61)"):
            assert words in message
        assert "is not in the model" in message or "more" in message
        assert rest_is_kept and steps == 3
        assert is_a_first_step


def _wrong_calls(folder: str) -> list[str]:
    """What each error says; the engine goes on after all of them."""
    engine = engine_for(CONFIG, seed=1)
    take_steps(engine, 1)
    first = engine.global_rank == 0
    calls: list[Callable[[], object]] = [
        lambda: engine.save_checkpoint(folder, "a" if first else "b"),
        lambda: engine.save_checkpoint(folder, client_state={} if first else [1]),
        lambda: engine.save_checkpoint(folder, client_state={"a": {1}} if first else {}),
        lambda: engine.save_checkpoint(folder, "../a"),
        lambda: engine.load_checkpoint(folder, TAG if first else "other"),
        lambda: engine.load_checkpoint(folder, load_optimizer_states=first),
    ]
    said = []
    for call in calls:
        with pytest.raises((RuntimeError, ValueError)) as raised:
            call()
        said.append(str(raised.value))
        take_steps(engine, 1)
    engine.destroy()
    for late in (lambda: engine.save_checkpoint(folder), lambda: engine.load_checkpoint(folder)):
        with pytest.raises(RuntimeError, match=r"after engine\.destroy\(\)"):
            late()
    return said


def test_a_wrong_call_is_the_same_error_on_all_ranks(ranks, copy):
    before = sorted(copy.rglob("*"))
    first, second = ranks(2).run(_wrong_calls, str(copy))
    assert first == second
    for text, words in zip(
        first,
        (
            "tag is a on rank 0 and b on rank 1",
            "rank 1: client_state is a list: give a dict",
            "rank 0: client_state.a is a set",
            "'../a'",
            f"tag is {TAG} on rank 0 and other on rank 1",
            "optimizer=True",
        ),
        strict=True,
    ):
        assert words in text
    assert sorted(copy.rglob("*")) == before


def _written_through_data(folder: str, stage: int) -> bool:
    config = {**config_for(2, stage, "bf16"), "scheduler": None}
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 0.0, "weight_decay": 0.0}}
    engine = engine_for(config, seed=1)
    take_steps(engine, 4)
    engine.module.layers[1].weight.data.fill_(0.5)
    engine.save_checkpoint(folder)
    engine.destroy()
    engine = engine_for(config, seed=2)
    engine.load_checkpoint(folder)
    take_steps(engine, 1)
    kept = bool((engine.module.layers[1].weight == 0.5).all())
    engine.destroy()
    return kept


@pytest.mark.parametrize("stage", [0, 2])
def test_what_was_written_without_being_counted_is_saved(ranks, tmp_path, stage):
    assert ranks(2).run(_written_through_data, str(tmp_path), stage) == [True, True]
