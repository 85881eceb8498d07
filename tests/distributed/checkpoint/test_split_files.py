"""A pipeline's checkpoints, exports and weights: all splits write the same files; misfits are named everywhere."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import partita
import pytest
import torch
from partita.checkpoint import CheckpointError, export, find
from safetensors.torch import load_file, save_file
from splits import LAYERS, REPLICA, SPLITS, TIED, Whole, config_for, engine_for, pieces_of, sequential, take_steps
from torch import Tensor

FEW = ("1 x 1, 2 chunks", "2 x 1, V", "2 x 2")


def _saves(folder: str, config: dict[str, Any], split: str, tied: bool) -> None:
    engine = engine_for(config, split, 1, tied)
    engine.save_checkpoint(folder, "first")
    engine.save_model(f"{folder}/export.safetensors")
    engine.save_model(f"{folder}/masters.safetensors", dtype=torch.float32)
    engine.destroy()


@pytest.mark.parametrize("tied", [False, True])
def test_all_splits_write_the_same_files(ranks, tmp_path, tied):
    """The model's files and exports, to the byte; an export of a checkpoint too."""
    names = ("first/model.safetensors", "export.safetensors", "masters.safetensors", "exported.safetensors")
    found: list[list[bytes]] = []
    facts: list[Any] = []
    for split in ("plain x 1", *FEW):
        folder = tmp_path / split
        ranks(SPLITS[split].ranks).run(_saves, str(folder), config_for(split, 1, "split", "AdamW"), split, tied)
        list(export(find(folder, "first"), folder / "exported.safetensors", None))
        found.append([(folder / name).read_bytes() for name in names])
        facts.append(find(folder, "first").manifest.engine["parameters"])
    assert all(files == found[0] for files in found)
    assert facts == [facts[0]] * len(facts)
    weights = sequential(1, tied=tied).state_dict()
    written = load_file(tmp_path / FEW[0] / "export.safetensors")
    assert written.keys() == weights.keys() == load_file(tmp_path / FEW[0] / "exported.safetensors").keys()
    masters = load_file(tmp_path / FEW[0] / "masters.safetensors")
    trained = [name for name in weights if not name.startswith("2.")]
    assert all(torch.equal(masters[name], weights[name]) for name in trained)


def _weights(seed: int, tied: bool) -> dict[str, Tensor]:
    """A state dict; of tied weights one name, as files of others have them."""
    state = sequential(seed, tied=tied).state_dict()
    return {name: value.clone() for name, value in state.items() if not (tied and name == TIED)}


def _of(weights: dict[str, Tensor], name: str) -> Tensor:
    return weights[name] if name in weights else weights[REPLICA]


def _takes(path: str, config: dict[str, Any], split: str, tied: bool, how: str) -> list[str]:
    """What differs from the source after the load, on this rank."""
    engine = engine_for(config, split, 2, tied)
    weights = _weights(1, tied)
    if how == "one rank's state dict":
        last = engine.world_size - 1
        missing = engine.load_module_state_dict(weights if engine.global_rank == last else {}, rank=last)
    elif how == "state_dict()":
        missing, _ = engine.load_state_dict({f"module.{name}": value for name, value in weights.items()})
    elif how == "files that one rank sees":
        missing = engine.load_module_state_dict(path if engine.global_rank == 0 else path + "not")
    else:
        missing = engine.load_module_state_dict(path)
    assert list(missing) == []
    take = engine.module_state_dict()
    assert len(take) < len(weights) or SPLITS[split].ranks == 1
    found = [name for name, value in take.items() if not torch.equal(value, _of(weights, name).to(value.dtype))]
    take_steps(engine, 1)
    engine.destroy()
    return found


@pytest.mark.parametrize("how", ["files", "one rank's state dict", "state_dict()", "files that one rank sees"])
@pytest.mark.parametrize("split", FEW)
def test_each_rank_takes_its_layers_of_whole_weights(ranks, tmp_path, split, how):
    for i, (stage, precision, tied) in enumerate([(0, "fp32", True), (2, "split", False)]):
        path = tmp_path / f"{i}.safetensors"
        save_file(_weights(1, tied), path)
        config = config_for(split, stage, precision, "AdamW")
        for differs in ranks(SPLITS[split].ranks).run(_takes, str(path), config, split, tied, how):
            assert differs == []


def _is_refused(folder: str, config: dict[str, Any], split: str, how: str) -> tuple[str, bool]:
    """What is said, and whether something has changed."""
    engine = engine_for(config, split, 2, tied=False)
    take_steps(engine, 1)
    before = pieces_of(engine)
    with pytest.raises((CheckpointError, ValueError)) as raised:
        if how == "checkpoint":
            engine.load_checkpoint(folder, "first")
        else:
            engine.load_module_state_dict(f"{folder}/export.safetensors")
    after = pieces_of(engine)
    changed = any(
        not torch.equal(a, b) for key in before for (_, a), (_, b) in zip(before[key], after[key], strict=True)
    )
    take_steps(engine, 1)
    engine.destroy()
    return str(raised.value), changed


def _rewritten(path: Path, change: Any) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("split", ["2 x 1, V", "2 x 2"])
def test_weights_of_another_model_are_named_on_all_ranks(ranks, tmp_path, split):
    """Before anything has changed: a name that only the last stage misses, and one that no stage has."""
    plain = "plain x 1"
    ranks(1).run(_saves, str(tmp_path), config_for(plain, 0, "fp32", "AdamW"), plain, False)
    last = f"{LAYERS - 1}.weight"
    _rewritten(tmp_path / "export.safetensors", lambda t: t.update({"other.weight": t.pop(last)}))
    said = ranks(SPLITS[split].ranks).run(
        _is_refused, str(tmp_path), config_for(split, 1, "fp32", "AdamW"), split, "files"
    )
    for text, changed in said:
        assert f"'{last}' is missing" in text
        assert "'other.weight' is not in the model" in text
        assert not changed


def _saves_another(folder: str, config: dict[str, Any]) -> None:
    """A model whose last layer has another name."""
    *first, last = sequential(1, tied=False)
    model = Whole(OrderedDict((*((str(i), layer) for i, layer in enumerate(first)), ("other", last))))
    engine = partita.Engine(model, config=config)
    engine.save_checkpoint(folder, "first")
    engine.destroy()


@pytest.mark.parametrize("split", ["2 x 1, V", "2 x 2"])
def test_a_checkpoint_of_another_model_is_named_on_all_ranks(ranks, tmp_path, split):
    ranks(1).run(_saves_another, str(tmp_path), config_for("plain x 1", 0, "fp32", "AdamW"))
    config = config_for(split, 1, "fp32", "AdamW")
    said = ranks(SPLITS[split].ranks).run(_is_refused, str(tmp_path), config, split, "checkpoint")
    assert len({text for text, _ in said}) == 1
    for text, changed in said:
        assert f"'{LAYERS - 1}.weight' is missing" in text
        assert "'other.weight'" in text
        assert not changed


@pytest.mark.parametrize("split", ["2 x 1, V", "2 x 2"])
def test_damage_of_a_tensor_that_one_rank_reads_is_refused_on_all(ranks, tmp_path, split):
    config = config_for(split, 1, "fp32", "AdamW")
    ranks(SPLITS[split].ranks).run(_saves, str(tmp_path), config, split, False)
    path = tmp_path / "first" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1  # of the last layer
    path.write_bytes(data)
    said = ranks(SPLITS[split].ranks).run(_is_refused, str(tmp_path), config, split, "checkpoint")
    assert len({text for text, _ in said}) == 1
    assert "not the bytes that were saved" in said[0][0]
    assert not any(changed for _, changed in said)
