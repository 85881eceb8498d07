"""engine.save_model() and save_16bit_model(): the live weights in one file, in every stage, or an error and no file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import inside
import partita
import pytest
import torch
from blocks_model import TRANSPORTS, BlocksModel, assert_same_weights, batch_of, config_for, error_of, take_step
from partita.utils import safe_get_full_fp32_param
from safetensors.torch import load_file
from torch import Tensor, nn

STAGES = (0, 1, 2, 3)


class Exported(BlocksModel):
    """C5: a tied head, a frozen layer, buffers, odd sizes and no elements, an integer parameter."""

    def __init__(self) -> None:
        super().__init__(blocks=2)
        self.frozen = nn.Linear(7, 5).requires_grad_(False)
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.large = nn.Parameter(torch.randn(4999))  # in the shards of all ranks, where those are whole pages
        self.number = nn.Parameter(torch.tensor(3), requires_grad=False)
        self.register_buffer("steps", torch.tensor(5))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("mean", torch.linspace(0, 1, 3))
        self.register_buffer("hidden", torch.ones(2), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        loss = super().forward(tokens, targets)
        return loss + self.large.float().square().mean() + self.nothing.sum() + self.frozen.weight.float().mean()


def make() -> Exported:
    torch.manual_seed(0)
    return Exported()


def _saves(folder: str, stage: int, over: str, precision: str) -> None:
    engine = partita.Engine(model=make(), config=config_for(stage, over, precision))
    for step in range(2):
        take_step(engine, step)
    root = Path(folder)
    engine.save_16bit_model(root, "live.safetensors")
    engine.save_model(root / "new" / "masters.safetensors", dtype=torch.float32)
    engine.save_model(root / "half.safetensors", dtype=torch.float16)
    live = engine.module_state_dict()
    masters = {name: safe_get_full_fp32_param(p) for name, p in engine.module.named_parameters(remove_duplicate=False)}
    inside.communicator(engine).barrier()  # rank 0 has written

    assert_same_weights(load_file(root / "live.safetensors"), live, "in the file")
    written = load_file(root / "new" / "masters.safetensors")
    assert written.keys() == live.keys()
    for name, value in live.items():
        master = masters.get(name)
        expected = value if not value.is_floating_point() else value.float() if master is None else master
        assert written[name].dtype == expected.dtype
        assert torch.equal(written[name], expected), name
        assert torch.equal(load_file(root / "half.safetensors")[name], written_as(value, torch.float16)), name
    if precision in ("bf16", "split"):
        assert not torch.equal(written["large"], live["large"].float())  # they are not rounded
    assert written["steps"].item() == 5
    assert written["nothing"].shape == (0, 3)
    assert "hidden" not in written

    fresh = make()
    fresh.load_state_dict(load_file(root / "new" / "masters.safetensors"))
    with torch.no_grad():
        loss = engine(*batch_of(9, 0))
    if precision == "fp32":
        assert torch.equal(fresh(*batch_of(9, 0)), loss)
    take_step(engine, 2)
    engine.destroy()


def written_as(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


@pytest.mark.parametrize("over", TRANSPORTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "split"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_file_has_the_live_weights_or_the_masters(ranks, tmp_path, stage, precision, over):
    """C5; and a plain model takes them strictly."""
    ranks(2).run(_saves, str(tmp_path), stage, over, precision)
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert found == ["half.safetensors", "live.safetensors", "new/masters.safetensors"]


def _same_file(folder: str) -> None:
    for stage in STAGES:
        engine = partita.Engine(model=make(), config=config_for(stage, "torch"))
        engine.save_model(Path(folder) / f"stage{stage}.safetensors")
        engine.destroy()


def test_every_stage_writes_the_same_bytes(ranks, tmp_path):
    ranks(2).run(_same_file, str(tmp_path))
    contents = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    assert len(contents) == 4
    assert contents.count(contents[0]) == 4


def _state_of_one_rank(stage: int, over: str, rank: int) -> tuple[list[str], bool]:
    engine = partita.Engine(model=make(), config=config_for(stage, over))
    one, everywhere = engine.module_state_dict(rank=rank), engine.module_state_dict()
    same = all(torch.equal(value, everywhere[name]) for name, value in one.items())
    take_step(engine, 0)
    engine.destroy()
    return list(one), same


@pytest.mark.parametrize("over", TRANSPORTS)
@pytest.mark.parametrize("stage", [0, 3])
def test_a_state_dict_for_one_rank_is_empty_elsewhere(ranks, stage, over):
    for rank in (0, 1):
        by_rank = ranks(2).run(_state_of_one_rank, stage, over, rank)
        assert by_rank[rank] == (list(make().state_dict()), True)
        assert by_rank[1 - rank] == ([], True)


# -- C2: what cannot be written


def _full(name: str) -> Any:
    """The disk is full when files get their room."""
    return mock.patch.object(os, "posix_fallocate", side_effect=OSError(28, "No space left on device"))


FAILURES: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "full disk": (_full, "a.safetensors", "No space left"),
    "a file is in the way of the folder": (nullcontext, "taken/a.safetensors", "taken"),
    "the name is that of a folder": (nullcontext, "folder.safetensors", "folder"),
    "the name is too long": (nullcontext, 300 * "x", "name too long"),
}


def _fails(folder: str, stage: int, over: str, failure: str) -> tuple[str, list[str]]:
    failing, name, _ = FAILURES[failure]
    root = Path(folder)
    engine = partita.Engine(model=make(), config=config_for(stage, over))
    other = partita.Engine(model=make(), config=config_for(stage, over))
    for each in (engine, other):
        take_step(each, 0)
    if engine.global_rank == 0:
        (root / "taken").write_text("a file")
        (root / "folder.safetensors" / "inner").mkdir(parents=True)
    inside.communicator(engine).barrier()
    with failing(name):
        message = error_of(lambda: engine.save_model(root / name), OSError)
    inside.communicator(engine).barrier()
    left = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    inside.communicator(engine).barrier()
    for each in (engine, other):
        take_step(each, 1)
    engine.save_model(root / "next.safetensors")
    assert_same_weights(engine.module_state_dict(), other.module_state_dict(), "after the error")
    inside.communicator(engine).barrier()
    assert_same_weights(load_file(root / "next.safetensors"), other.module_state_dict(), "in the next file")
    engine.destroy()
    other.destroy()
    return message, left


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize(("stage", "over"), [(0, "torch"), (3, "shared_memory"), (3, "torch")])
def test_an_error_of_rank_0s_disk_is_raised_everywhere_and_leaves_no_file(ranks, tmp_path, stage, over, failure):
    """All ranks raise, none waits, training goes on, and the next file is written."""
    first, second = ranks(2).run(_fails, str(tmp_path), stage, over, failure)
    path = str(tmp_path / FAILURES[failure][1])
    assert f"'{path}' was not written" in first[0]
    assert FAILURES[failure][2].lower() in first[0].lower()
    assert second[0] == first[0]
    assert first[1] == second[1] == ["folder.safetensors", "folder.safetensors/inner", "taken"]


class WithExtra(BlocksModel):
    def get_extra_state(self) -> dict[str, int]:
        return {"epoch": 3}

    def set_extra_state(self, state: Any) -> None:
        """Nothing to set."""


def _refuses(folder: str, stage: int) -> list[str]:
    messages = []
    odd = BlocksModel()
    odd.register_buffer("odd", torch.ones(2, dtype=torch.complex128))
    for model in (WithExtra(), odd):
        engine = partita.Engine(model=model, config=config_for(stage))
        messages.append(error_of(lambda e=engine: e.save_model(Path(folder) / "a"), ValueError))
        take_step(engine, 0)
        engine.destroy()
    return messages


@pytest.mark.parametrize("stage", [0, 3])
def test_what_the_format_lacks_is_refused_by_name_on_all_ranks(ranks, tmp_path, stage):
    """Promise 7"""
    for extra, dtype in ranks(2).run(_refuses, str(tmp_path), stage):
        assert "'_extra_state' in the model's state dict is a dict: only tensors are written" in extra
        assert "'odd' is torch.complex128: safetensors files have" in dtype
    assert list(tmp_path.iterdir()) == []


# -- folders


def _shards(folder: str, stage: int, precision: str) -> None:
    engine = partita.Engine(model=make(), config=config_for(stage, "auto", precision))
    root = Path(folder)
    for step, max_bytes in enumerate((3000, 10**9, 6000)):  # several files, one, and others
        take_step(engine, step)
        inside.save_in_files_of(engine, root, max_bytes)
        live = engine.module_state_dict()
        inside.communicator(engine).barrier()
        files = sorted(path.name for path in root.iterdir())
        if max_bytes == 10**9:
            assert files == ["model.safetensors", "notes.txt"]
        else:
            weight_map = json.loads((root / "model.safetensors.index.json").read_text())["weight_map"]
            assert files == sorted({*weight_map.values(), "model.safetensors.index.json", "notes.txt"})
            assert len(files) > 4
        written: dict[str, Tensor] = {}
        for path in root.glob("*.safetensors"):
            written.update(load_file(path))
        assert_same_weights(written, live, "in the files")
        inside.communicator(engine).barrier()
    assert engine.load_module_state_dict(root) == []
    engine.destroy()


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "split"), (3, "bf16")])
@pytest.mark.parametrize("size", [2, 3])
def test_a_folder_has_one_export_whole(ranks, tmp_path, size, stage, precision):
    """C5: files of another number are gone with the index; what is of others stays."""
    (tmp_path / "notes.txt").write_text("mine")
    ranks(size).run(_shards, str(tmp_path), stage, precision)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def _is_older(folder: str) -> str:
    engine = partita.Engine(model=make(), config=config_for(2, "auto"))
    root = Path(folder)
    inside.save_in_files_of(engine, root, 3000)
    before = {path.name: path.read_bytes() for path in root.iterdir()}
    inside.communicator(engine).barrier()
    take_step(engine, 0)
    fails = mock.patch.object(os, "pwrite", side_effect=OSError(5, "Input/output error"))
    if engine.global_rank == 1:  # the folder is not seen there
        fails = mock.patch.object(os, "open", side_effect=FileNotFoundError(2, "not here"))
    with fails:
        message = error_of(lambda: inside.save_in_files_of(engine, root, 3000), Exception)
    inside.communicator(engine).barrier()
    assert {path.name: path.read_bytes() for path in root.iterdir()} == before
    engine.destroy()
    return message


def test_an_error_of_one_rank_leaves_the_older_export(ranks, tmp_path):
    first, second = ranks(2).run(_is_older, str(tmp_path))
    assert first == second
    assert "rank 1:" in first and "is not seen here" in first


def test_pickles_and_places_in_a_checkpoint_are_refused(tmp_path):
    engine = partita.Engine(model=make(), config=config_for(0))
    with pytest.raises(ValueError, match="pickles are not written"):
        engine.save_model(tmp_path / "pytorch_model.bin")
    engine.save_checkpoint(tmp_path, "a")
    with pytest.raises(OSError, match="would be in the checkpoint"):
        engine.save_model(tmp_path / "a" / "x.safetensors")
    with pytest.raises(ValueError, match=r"dtype = torch\.int32"):
        engine.save_model(tmp_path / "b", dtype=torch.int32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "latest"]
