"""What is given as weights and is none: pickles, checkpoints of several things. They are named, and never opened."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import partita
import pytest
import torch
from partita.zero import load_weights
from safetensors.torch import save_file
from small_models import Regression, config, inputs, seeded


def zipped(path: Path) -> None:
    torch.save(Regression().state_dict(), path)


def of_old_torch(path: Path) -> None:
    torch.save(Regression().state_dict(), path, _use_new_zipfile_serialization=False)


def plain(path: Path) -> None:
    path.write_bytes(pickle.dumps({"first.weight": 1}))


PICKLES: dict[str, Callable[[Path], None]] = {"zip": zipped, "old": of_old_torch, "plain": plain}
LOADERS: dict[str, Callable[[Any], Any]] = {
    "engine": lambda source: partita.Engine(seeded(), config=config()).load_module_state_dict(source),
    "zero.load_weights": lambda source: load_weights(seeded(), source),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", ["weights.pt", "pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_is_named_whatever_it_is_called(tmp_path, kind, name, loader):
    """Promise 6: nothing is unpickled. The message has the call that loads it."""
    path = tmp_path / name
    PICKLES[kind](path)
    with pytest.raises(ValueError, match=rf"{name}' is a pickle.*torch\.load\('.*{name}'.*weights_only=True\)"):
        LOADERS[loader](path)


def test_a_folder_with_pickles_alone_names_one(tmp_path):
    zipped(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no \*\.safetensors file in '.*pytorch_model\.bin' is a pickle.*torch\.load"):
        load_weights(seeded(), tmp_path)


def _write_indexed(folder: Path, **changes: str) -> dict[str, torch.Tensor]:
    """A folder with an index, and with a file that the index does not name; the weights."""
    weights = seeded(seed=7).state_dict()
    weight_map = {}
    for i, (name, value) in enumerate(weights.items()):
        weight_map[name] = f"part-{i}.safetensors"
        save_file({name: value.contiguous()}, folder / weight_map[name])
    save_file({"other": torch.ones(1)}, folder / "consolidated.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map | changes}))
    return weights


def test_the_files_of_an_index_count_and_no_others(tmp_path):
    weights, model = _write_indexed(tmp_path), seeded()
    assert load_weights(model, tmp_path) == []
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("file", ["part-1.safetensors", "nothing.safetensors", "../part-0.safetensors"])
def test_an_index_that_is_wrong_is_refused(tmp_path, file):
    name = next(iter(_write_indexed(tmp_path)))
    _write_indexed(tmp_path, **{name: file})
    with pytest.raises(ValueError, match=rf"{name}|{file}"):
        load_weights(seeded(), tmp_path)


def test_a_folder_of_checkpoints_says_which_to_give(tmp_path):
    engine = partita.Engine(seeded(), config=config())
    engine.train_batch(inputs())
    engine.save_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"give one of them, such as '.*global_step1'"):
        load_weights(seeded(), tmp_path)
    assert load_weights(model := seeded(), tmp_path / "global_step1") == []
    trained = engine.module_state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())


def test_an_encrypted_checkpoint_says_who_opens_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PARTITA_TEST_KEY", bytes(range(32)).hex())
    sealed = {"checkpoint": {"encryption": {"key_env": "PARTITA_TEST_KEY"}}}
    engine = partita.Engine(seeded(), config={**config(), **sealed})
    engine.train_batch(inputs())
    engine.save_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"is encrypted: engine\.load_checkpoint\("):
        load_weights(seeded(), tmp_path / "global_step1")


def test_the_way_out_works(tmp_path):
    engine = partita.Engine(seeded(), config=config())
    path = tmp_path / "weights.pt"
    torch.save(seeded(seed=7).state_dict(), path)
    assert engine.load_module_state_dict(torch.load(path, map_location="cpu", weights_only=True)) == []
    other = partita.Engine(seeded(seed=7), config=config())
    assert engine.train_batch(inputs()).item() == other.train_batch(inputs()).item()


def test_a_checkpoint_of_several_things_says_where_the_state_dict_is():
    checkpoint = {"epoch": 3, "model": seeded().state_dict(), "optimizer": {}}
    with pytest.raises(ValueError, match=r"checkpoint of several things.*one of 'model', 'optimizer'"):
        load_weights(seeded(), checkpoint)  # type: ignore[arg-type]
