"""Checkpoints of a run on a GPU: the same bits after a resume, there and from and to the CPU."""

from __future__ import annotations

from typing import Any

import partita
import pytest
import torch
from device_runs import FP16, HOST, SPLIT, WHOLE, Deep, assert_same, engine_of, samples, state_of
from on_gpu import CPU, on_both_devices

WIDTH = 16
KINDS: dict[str, dict[str, Any]] = {
    "0": {"stage": 0, **WHOLE},
    "1, split": {"stage": 1, **SPLIT},
    "2, fp16": {"stage": 2, **FP16},
    "2, offloaded": {"stage": 2, **WHOLE, "zero_optimization": {"offload_optimizer": HOST}},
    "3": {"stage": 3, **WHOLE},
    "3, offloaded": {"stage": 3, "zero_optimization": {"offload_optimizer": HOST, "offload_param": HOST}},
}


def engine_for(device: torch.device, kind: str, **changes: Any) -> partita.Engine:
    return engine_of(Deep(3, WIDTH).to(device), **KINDS[kind], gradient_clipping=0.5, **changes)


def go_on(engine: partita.Engine, steps: range) -> list[float]:
    return [engine.train_batch(samples(step, 2, engine.device, WIDTH)).item() for step in steps]


@pytest.mark.parametrize("beside", [False, True], ids=["at once", "beside training"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.pairwise
@on_both_devices
def test_a_resumed_run_has_the_bits_of_one_that_went_on(device, kind, beside, tmp_path):
    """Saved on the device, also while training goes on; loaded there."""
    changes = {"checkpoint": {"async_save": beside}}
    engine = engine_for(device, kind, **changes)
    go_on(engine, range(3))
    engine.save_checkpoint(tmp_path, client_state={"note": 3})
    losses = go_on(engine, range(3, 6))
    expected = state_of(engine)
    engine.destroy()
    resumed = engine_for(device, kind, **changes)
    _, client = resumed.load_checkpoint(tmp_path)
    assert client["note"] == 3
    assert go_on(resumed, range(3, 6)) == losses
    assert_same(state_of(resumed), expected)
    resumed.destroy()


@pytest.mark.parametrize("kind", ["0", "1, split", "3, offloaded"])
@on_both_devices
def test_a_checkpoint_goes_from_a_device_to_the_cpu_and_back(device, kind, tmp_path):
    """A file knows no device: weights and states are the same bits in all three engines."""
    seen = []
    for number, where in enumerate((device, CPU, device)):
        engine = engine_for(where, kind)
        if number:
            engine.load_checkpoint(tmp_path / str(number - 1))
        else:
            go_on(engine, range(3))
        engine.save_checkpoint(tmp_path / str(number))
        seen.append(state_of(engine))
        engine.destroy()
    assert_same(seen[1], seen[0])
    assert_same(seen[2], seen[0])
    folders = [tmp_path / str(number) for number in range(3)]
    names = [sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors")) for folder in folders]
    assert names[0] and names[0] == names[1] == names[2]
    for name in names[0]:
        assert len({(folder / name).read_bytes() for folder in folders}) == 1, name
