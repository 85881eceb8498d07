"""A frozen base under adapters is written once: later checkpoints link its files, by digest."""

from __future__ import annotations

from pathlib import Path

import partita
import pytest
import torch
from partita.checkpoint import find, prune, verify
from partita.checkpoint.unchanged import try_link
from torch import Tensor, nn

WIDTH = 700  # a base of 1.9 MB in bf16


class Adapted(nn.Module):
    """A frozen base, whose weights follow from a seed, and a small adapter."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.base = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)).requires_grad_(False)
        self.adapter = nn.Sequential(nn.Linear(WIDTH, 2), nn.Linear(2, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.base:
            x = torch.tanh(layer(x)) + self.adapter(x)
        return x.square().mean()


def _engine(stage: int, seed: int, *, beside: bool) -> partita.Engine:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW"},
        "steps_per_print": 0,
        "checkpoint": {"async_save": beside},
    }
    engine, *_ = partita.initialize(model=Adapted(seed), config=config)
    return engine


def _step(engine: partita.Engine) -> None:
    engine.backward(engine(torch.ones(2, WIDTH, dtype=torch.bfloat16)))
    engine.step()


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """Name -> (inode, size)."""
    return {path.name: (path.stat().st_ino, path.stat().st_size) for path in sorted(folder.iterdir())}


def save_three(folder: str, stage: int, beside: bool) -> tuple[list[dict[str, tuple[int, int]]], dict[str, Tensor]]:
    """Saves after each of two steps, and after a frozen weight has changed. The files of each, and the last weights."""
    engine = _engine(stage, 1, beside=beside)
    found = []
    for tag in ("first", "second", "changed"):
        _step(engine)
        if tag == "changed":
            weights = engine.module_state_dict()
            weights["base.1.bias"] += 1
            engine.load_module_state_dict(weights)
        engine.save_checkpoint(folder, tag)
        engine.wait_for_save()
        found.append(_files(Path(folder, tag)))
    weights = engine.module_state_dict()
    engine.destroy()
    return found, weights


def load(folder: str, tag: str, stage: int) -> dict[str, Tensor]:
    """The weights of a checkpoint in another model; and it saves again, with these ranks."""
    engine = _engine(stage, 2, beside=False)
    engine.load_checkpoint(folder, tag)
    weights = engine.module_state_dict()
    engine.save_checkpoint(folder, "other")
    engine.destroy()
    return weights


@pytest.mark.parametrize(("stage", "beside"), [(0, True), (3, False)])
def test_a_frozen_base_is_linked(ranks, tmp_path, stage, beside):
    (first, second, changed), weights = ranks(2).run(save_three, str(tmp_path), stage, beside)[0]
    base, adapter = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert first[base][1] > 1_900_000 > 100_000 > first[adapter][1] + first["optimizer.safetensors"][1]
    assert second[base] == first[base], "it has the same inode"
    assert second[adapter][0] != first[adapter][0]
    assert changed[base][0] != first[base][0]
    prune(tmp_path, 1)
    found = find(tmp_path, None)
    assert found.tag == "changed"
    assert [chunk.problem for chunk in verify(found.path, found.manifest) if chunk.problem] == []
    for loaded in ranks(2).run(load, str(tmp_path), "changed", stage):
        assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert _files(tmp_path / "other")[base] == changed[base], "also in another run"


def save_in_folders(folder: str) -> list[tuple[int, int]]:
    """The base's file of two checkpoints in folders of their own: the second one told of the first, and not told."""
    engine = _engine(2, 1, beside=False)
    _step(engine)
    first = engine.save_checkpoint(f"{folder}/first", "own")
    told = engine.save_checkpoint(f"{folder}/told", "own", earlier=first)
    alone = engine.save_checkpoint(f"{folder}/alone", "own")
    nowhere = engine.save_checkpoint(f"{folder}/nowhere", "own", earlier=f"{folder}/is not there")
    engine.destroy()
    return [_files(path)["model-00001-of-00002.safetensors"] for path in (first, told, alone, nowhere)]


def test_a_frozen_base_is_linked_from_another_folder(ranks, tmp_path):
    first, told, alone, nowhere = ranks(2).run(save_in_folders, str(tmp_path))[0]
    assert told == first
    assert alone[0] != first[0] and nowhere[0] != first[0] and alone[1] == nowhere[1] == first[1]


def test_other_ranks_write_what_they_cannot_compare(ranks, tmp_path):
    """Chunks begin elsewhere there: the bytes are the same, and the file is another."""
    *_, changed = ranks(2).run(save_three, str(tmp_path), 2, False)[0][0]
    ranks(3).run(load, str(tmp_path), "changed", 2)
    name = "model-00001-of-00002.safetensors"
    assert _files(tmp_path / "other")[name][0] != changed[name][0]
    assert (tmp_path / "other" / name).read_bytes() == (tmp_path / "changed" / name).read_bytes()


@pytest.mark.parametrize("what", ["missing", "link", "folder", "other size", "other mode"])
def test_only_a_file_of_this_size_and_mode_is_linked(tmp_path, what):
    """Nothing is left where it cannot be; a file system without links says the same as a missing file."""
    source, target = tmp_path / "source", tmp_path / "target"
    if what == "link":
        (tmp_path / "elsewhere").write_bytes(b"1234")
        source.symlink_to(tmp_path / "elsewhere")
    elif what == "folder":
        source.mkdir()
    elif what == "other size":
        source.write_bytes(b"123")
        source.chmod(0o600)
    elif what == "other mode":
        source.write_bytes(b"1234")
        source.chmod(0o640)
    before = sorted(tmp_path.iterdir())
    assert not try_link(source, target, 4, 0o600)
    assert sorted(tmp_path.iterdir()) == before
    source = tmp_path / "sound"
    source.write_bytes(b"1234")
    source.chmod(0o600)
    assert try_link(source, target, 4, 0o600)
    assert target.stat().st_ino == source.stat().st_ino


def test_a_file_that_cannot_be_linked_is_written(ranks, tmp_path):
    """A link has its name, say."""
    name = "model-00001-of-00002.safetensors"
    first = ranks(1).run(begin, str(tmp_path / "all"), "first")[0]
    (tmp_path / "all" / "first" / name).rename(tmp_path / "elsewhere")
    (tmp_path / "all" / "first" / name).symlink_to(tmp_path / "elsewhere")
    second = ranks(1).run(begin, str(tmp_path / "all"), "second")[0]
    assert second[name][0] != first[name][0]
    found = find(tmp_path / "all", "second")
    assert [chunk.problem for chunk in verify(found.path, found.manifest) if chunk.problem] == []


def begin(folder: str, tag: str) -> dict[str, tuple[int, int]]:
    """A save of a new run; its files."""
    engine = _engine(1, 1, beside=False)
    _step(engine)
    engine.save_checkpoint(folder, tag)
    engine.destroy()
    return _files(Path(folder, tag))
