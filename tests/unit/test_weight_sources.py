"""What is given as weights and is none: pickles, checkpoints of several things. They are named, and never opened."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import partita
import pytest
import torch
from partita.zero import load_weights
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
