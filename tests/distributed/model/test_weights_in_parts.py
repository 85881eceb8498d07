"""Weights from files: each rank reads its part of them, checks it and needs no memory; or one rank reads for all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import inside
import partita
import pytest
import torch
from communicators import communicating_through
from memory import peak_growth
from partita import zero
from ranks import RankPool
from resumed import config_for, differences, engine_for, take_steps, train_and_save
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WIDTH, LAYERS = 1100, 8
NUMEL = WIDTH * WIDTH * LAYERS
ROOM_BYTES = 12 << 20  # what passes through at once
TAG = "global_step3"


class Wide(nn.Module):
    """Parameters of several MiB, and a buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
        self.register_buffer("mean", torch.rand(5).double().t())


def _config(stage: int, precision: str, ranks: int = 2) -> dict[str, Any]:
    return config_for(ranks, stage, precision, bucket=WIDTH * WIDTH)


def _read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def _counted(load: Callable[[], object]) -> int:
    before = _read_bytes()
    load()
    return _read_bytes() - before


def _loaded(path: str, stage: int, precision: str, ranks: int) -> tuple[int, int, list[str]]:
    """The bytes that this rank reads, by how much it grows in a second load, and which values are wrong."""
    expected = load_file(path)
    with communicating_through(lambda real: real) as communicator:
        engine = partita.Engine(Wide(2), config=_config(stage, precision, ranks))
        nbytes = _counted(lambda: engine.load_module_state_dict(path))
        with peak_growth(communicator) as peak:
            engine.load_module_state_dict(path)
    found = engine.module_state_dict()
    wrong = [name for name, value in found.items() if not torch.equal(value, expected[name].to(value.dtype))]
    engine.destroy()
    return nbytes, peak[0], wrong


@pytest.mark.parametrize(
    ("stage", "precision", "ranks"),
    [
        (3, "bf16", 2),
        (2, "fp32", 3),
        pytest.param(0, "split", 2, marks=pytest.mark.slow),
        pytest.param(3, "fp32", 3, marks=pytest.mark.slow),
    ],
)
def test_a_rank_reads_its_part_and_needs_no_memory(tmp_path, transport, stage, precision, ranks):
    """Of each parameter; in every stage, as ranks give each other what all of them have."""
    path = tmp_path / "model.safetensors"
    save_file({name: value.clone() for name, value in Wide(1).state_dict().items()}, path)
    pool = RankPool(ranks, transport)  # fresh processes: what an allocator kept from other tests would hide the peak
    found = pool.run(_loaded, str(path), stage, precision, ranks)
    pool.close()
    for nbytes, peak, wrong in found:
        assert wrong == []
        assert 0.99 * 4 * NUMEL / ranks < nbytes < 1.02 * 4 * NUMEL / ranks + 50_000
        assert peak < ROOM_BYTES < 4 * NUMEL / ranks
    assert sum(nbytes for nbytes, *_ in found) >= 4 * NUMEL


def _into_init(path: str) -> tuple[int, list[str]]:
    expected = load_file(path)
    config = _config(3, "bf16")
    with zero.Init(config=config):
        model = Wide(2)
    nbytes = _counted(lambda: zero.load_weights(model, path))
    with zero.GatheredParameters(model.parameters()):
        found = {name: value.clone() for name, value in model.state_dict().items()}
    return nbytes, [name for name, value in found.items() if not torch.equal(value, expected[name].to(value.dtype))]


def test_a_rank_reads_its_part_of_what_init_has_built(ranks, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({name: value.clone() for name, value in Wide(1).state_dict().items()}, path)
    for nbytes, wrong in ranks(2).run(_into_init, str(path)):
        assert wrong == []
        assert 0.99 * 4 * NUMEL / 2 < nbytes < 1.02 * 4 * NUMEL / 2 + 50_000


def _from_checkpoint(folder: str, config: dict[str, Any], damages: bool) -> Any:
    """The weights after a load of a checkpoint; or what is said of a damaged one, and what has changed."""
    engine = engine_for(config, seed=2)
    take_steps(engine, 1)
    before = engine.module_state_dict()
    path = Path(folder, TAG)
    if damages:
        with pytest.raises(ValueError, match="digest") as raised:
            engine.load_module_state_dict(path)
        after = differences(engine.module_state_dict(), before)
        take_steps(engine, 1)
        engine.destroy()
        return str(raised.value)[str(raised.value).index("'layers.1.bias'") :], after
    assert engine.load_module_state_dict(path) == []
    weights = engine.module_state_dict()
    engine.destroy()
    return weights


@pytest.mark.parametrize(("size", "stage", "precision"), [(3, 3, "split"), (2, 1, "bf16"), (1, 0, "bf16")])
def test_weights_of_a_checkpoint(ranks, tmp_path, size, stage, precision):
    """Its model's files alone, with tied, frozen and lone parameters and buffers, and on other ranks."""
    saved = ranks(2).run(train_and_save, str(tmp_path), config_for(2, 2, "bf16"))[0]
    for found in ranks(size).run(_from_checkpoint, str(tmp_path), config_for(size, stage, precision), False):
        assert [name for name, value in found.items() if not torch.equal(value, saved[f"weight {name}"])] == []


@pytest.mark.parametrize("stage", [2, 3])
def test_a_damaged_checkpoint_gives_no_weights(ranks, tmp_path, stage):
    """One rank finds it, all say it, and nothing has changed."""
    ranks(2).run(train_and_save, str(tmp_path), config_for(2, 2, "bf16"))
    path = tmp_path / TAG / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    (said, changed), other = ranks(2).run(_from_checkpoint, str(tmp_path), config_for(2, stage, "bf16"), True)
    assert (said, changed) == other
    assert changed == []
    assert f"in '{path}', bytes " in said


def _with_own_disks(folder: str, kind: str, stage: int) -> tuple[list[str], Tensor]:
    """A load of a file that is not the same, or not there, on the disk of rank 0."""
    engine = engine_for(config_for(2, stage, "fp32"), seed=2)
    rank = engine.global_rank
    own = Path(folder, str(rank))
    own.mkdir()
    weights = {name: value + rank for name, value in engine.module_state_dict().items() if name != "tied.weight"}
    if rank or kind == "other":
        save_file(weights, own / "model.safetensors")
    before = os.getcwd()
    os.chdir(own)
    try:
        missing = engine.load_module_state_dict("model.safetensors", rank=1)
    finally:
        os.chdir(before)
    found = engine.module_state_dict()
    engine.destroy()
    return missing, found["layers.1.weight"] - weights["layers.1.weight"] + rank


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("kind", ["other", "missing"])
def test_without_a_shared_disk_one_rank_reads_for_all(ranks, tmp_path, kind, stage):
    """No rank takes a part of another file: what counts is what the rank that was asked to read has."""
    for missing, change in ranks(2).run(_with_own_disks, str(tmp_path), kind, stage):
        assert missing == []
        assert torch.allclose(change, torch.ones_like(change), atol=1e-6)


def _cut_meanwhile(path: str) -> tuple[str, str]:
    """A file that is cut on the last rank's side when the first weights are written."""
    engine = partita.Engine(Wide(2), config=_config(3, "fp32"))
    if engine.global_rank == 1:
        inside.units(engine)[0].before_write = lambda: os.truncate(path, 1 << 20)
    with pytest.raises(zero.PartlyLoadedError) as loaded:
        engine.load_module_state_dict(path)
    with pytest.raises(RuntimeError, match="a load that failed") as saved:
        engine.save_checkpoint(Path(path).parent, "mixed")
    engine.destroy()
    return str(loaded.value), str(saved.value)


def test_a_file_that_is_cut_meanwhile(ranks, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({name: value.clone() for name, value in Wide(1).state_dict().items()}, path)
    for loaded, saved in ranks(2).run(_cut_meanwhile, str(path)):
        assert loaded.startswith("the weights were loaded in part, and the model is a mixture: ")
        assert f"'{path}', bytes " in loaded
        assert "the file is shorter" in loaded
        assert "save_checkpoint()" in saved


def _inside_a_block(path: str) -> list[bool]:
    """Whether every rank has the weights in a block that was entered before, and after that."""
    expected = load_file(path)
    engine = partita.Engine(Wide(2), config=_config(3, "fp32"))
    parameters = list(engine.module.parameters())
    with zero.GatheredParameters(parameters, modifier_rank=0):
        zero.load_weights(engine.module, path)
        inner = {name: value.clone() for name, value in engine.module.state_dict().items()}
    outer = engine.module_state_dict()
    engine.destroy()
    return [all(torch.equal(found[name], value) for name, value in expected.items()) for found in (inner, outer)]


def test_weights_are_there_where_parameters_were_gathered_before(ranks, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({name: value.clone() for name, value in Wide(1).state_dict().items()}, path)
    assert ranks(2).run(_inside_a_block, str(path)) == [[True, True]] * 2
