"""Loads read into the live state: they take no memory, and a file that changes meanwhile stops the run, not a save."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import partita
import pytest
import torch
from communicators import communicating_through
from memory import peak_growth
from partita.checkpoint import CheckpointError
from ranks import RankPool
from resumed import config_for, differences, digest_of, engine_for, take_steps, train_and_save, whole_state
from torch import nn

WIDTH, LAYERS = 1500, 4
STATES_BYTES = 12 * WIDTH * WIDTH * LAYERS // 2  # of one of 2 ranks, at least
ROOM_BYTES = 16 << 20  # what passes through at once, native threads and a layer's reduction included
KEY = "PARTITA_TEST_KEY"
SEALED = {"checkpoint": {"encryption": {"key_env": KEY}}}


class Wide(nn.Module):
    """Parameters of many chunks."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x.to(self.layers[0].weight.dtype)).float().square().mean()


def _config(stage: int, precision: str, sealed: bool) -> dict[str, Any]:
    changes = {**(SEALED if sealed else {}), "scheduler": None}
    return config_for(2, stage, precision, bucket=WIDTH * WIDTH, zero_stage3_prefetch_bucket_size=0, **changes)


def _trained(seed: int, config: dict[str, Any]) -> partita.Engine:
    engine = partita.Engine(Wide(seed), config=config)
    engine.backward(engine(torch.ones(6, WIDTH)))
    engine.step()
    return engine


def _masters_and_moments(engine: partita.Engine) -> str:
    state = whole_state(engine, "AdamW")
    return digest_of({name: value for name, value in state.items() if not name.startswith(("weight", "counts"))})


def _save(folder: str, stage: int, precision: str, sealed: bool) -> str:
    os.environ[KEY] = bytes(range(32)).hex()
    engine = _trained(1, _config(stage, precision, sealed))
    engine.save_checkpoint(folder, "step")
    digest = _masters_and_moments(engine)
    engine.destroy()
    return digest


def _load(folder: str, stage: int, precision: str, sealed: bool) -> tuple[str, int]:
    """The state after a load, and by how much the process grows during a second one."""
    os.environ[KEY] = bytes(range(32)).hex()
    with communicating_through(lambda real: real) as communicator:
        engine = _trained(2, _config(stage, precision, sealed))
        engine.load_checkpoint(folder, "step")
        digest = _masters_and_moments(engine)
        with peak_growth(communicator) as peak:
            engine.load_checkpoint(folder, "step")
    engine.destroy()
    return digest, peak[0]


@pytest.mark.parametrize(
    ("saved", "loaded", "stage", "sealed"),
    [
        pytest.param("bf16", "bf16", 2, False, marks=pytest.mark.slow),
        pytest.param("split", "bf16", 3, False),
        pytest.param("bf16", "split", 1, True),
        pytest.param("split", "split", 2, False, marks=pytest.mark.slow),
        pytest.param("fp32", "fp32", 3, False, marks=pytest.mark.slow),
        pytest.param("fp32", "fp32", 0, True, marks=pytest.mark.slow),
    ],
)
def test_a_load_takes_no_memory(tmp_path, transport, saved, loaded, stage, sealed):
    """Whatever is converted, joined, split or decrypted passes through a few MiB, and has the bits that were saved."""
    pool = RankPool(2, transport)  # fresh processes: what an allocator kept from other tests would hide the peak
    digests = pool.run(_save, str(tmp_path), 2, saved, sealed)
    found = pool.run(_load, str(tmp_path), stage, loaded, sealed)
    pool.close()
    assert {digest for digest, _ in found} == set(digests)
    assert len(set(digests)) == 1
    peak = max(peak for _, peak in found)
    print(f"{saved} to {loaded}: {peak / 2**20:.1f} MiB beside {STATES_BYTES / 2**20:.0f} MiB of states")
    assert peak < ROOM_BYTES < STATES_BYTES / 3


def _written_before(folder: str, config: dict[str, Any], counted: bool) -> list[str]:
    """How the state after a load, which the program wrote into before, differs from what was saved."""
    saved = train_and_save(folder, config)
    engine = engine_for(config, seed=2)
    take_steps(engine, 1)
    with torch.no_grad():
        for parameter in engine.module.parameters():
            (parameter if counted else parameter.data).add_(1)
    engine.load_checkpoint(folder)
    changed = differences(whole_state(engine, "AdamW"), saved)
    engine.save_checkpoint(folder, "again")  # which looks for what was written
    changed += differences(whole_state(engine, "AdamW"), saved)
    engine.destroy()
    return changed


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("precision", ["split", "bf16"])
def test_a_load_overwrites_what_a_program_has_written(ranks, tmp_path, precision, counted):
    """Nothing of it comes back, into masters or remainders, when written parameters are adopted later."""
    assert ranks(2).run(_written_before, str(tmp_path), config_for(2, 2, precision), counted) == [[], []]


class Meddler:
    """A schedule whose state is loaded after all files have been found sound: it changes one of them then."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path

    def step(self) -> None:
        """Changes nothing."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.path is not None:
            data = bytearray(self.path.read_bytes())
            data[-1] ^= 1
            self.path.write_bytes(data)


def _refuses(error: type[Exception], call: Any, *args: Any) -> str:
    with pytest.raises(error, match="load") as raised:
        call(*args)
    return str(raised.value)


def _changed_meanwhile(folder: str) -> tuple[list[str], list[str]]:
    """What is said of a file that changes on rank 1's side, and of what the program tries then; whether a load of
    another checkpoint makes everything as it was."""
    config = {**config_for(2, 2, "bf16"), "scheduler": None}
    schedule = Meddler()
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    engine = partita.Engine(model, lr_scheduler=schedule, config=config)

    def batch() -> torch.Tensor:
        return engine(torch.ones(6, 64, dtype=torch.bfloat16)).float().square().mean()

    for tag in ("sound", "changed"):
        engine.backward(batch())
        engine.step()
        engine.save_checkpoint(folder, tag)
        if tag == "sound":
            state = whole_state(engine, "AdamW")
    if engine.global_rank == 1:
        schedule.path = Path(folder, "changed", "optimizer.safetensors")
    said = [_refuses(CheckpointError, engine.load_checkpoint, folder, "changed")]
    schedule.path = None
    said.append(_refuses(RuntimeError, batch))
    said.append(_refuses(RuntimeError, engine.save_checkpoint, folder, "mixed"))
    said.append(_refuses(RuntimeError, engine.save_model, Path(folder, "mixed")))
    engine.load_checkpoint(folder, "sound", load_module_only=True)  # leaves the mixture of moments
    said.append(_refuses(RuntimeError, engine.save_checkpoint, folder, "mixed"))
    engine.load_checkpoint(folder, "sound")
    changed = differences(whole_state(engine, "AdamW"), state)
    engine.backward(batch())
    engine.step()
    engine.destroy()
    return said, changed


def test_a_file_that_changes_after_it_was_found_sound(ranks, tmp_path):
    """All ranks say which part has changed. Nothing goes on from the mixture, or saves it, until a whole load."""
    first, second = ranks(2).run(_changed_meanwhile, str(tmp_path))
    assert first == second
    (loaded, *later), changed = first
    assert "optimizer.safetensors" in loaded
    assert "in part" in loaded
    assert "digest differs" in loaded
    assert len(later) == 4
    assert all("a load that failed" in text for text in later)
    assert changed == []
    assert not Path(tmp_path, "mixed").exists()
