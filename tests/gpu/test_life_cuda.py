"""The life of an engine where tensors that name no device are made somewhere else; a pipeline of one process."""

from __future__ import annotations

from typing import Any

import partita
import pipelines
import pytest
import torch
from device_runs import HOST, WHOLE, Deep, assert_same, engine_of, samples, state_of
from on_gpu import CPU, CUDA, NEEDS_CUDA, on_both_devices

WIDTH = 16
# Where the model is, and where torch makes what names no device. Tensors of "meta" have no values.
DEFAULTS = [
    pytest.param(CPU, torch.device("meta"), id="cpu-meta"),
    pytest.param(CUDA, CUDA, id="cuda-cuda", marks=NEEDS_CUDA),
    pytest.param(CPU, CUDA, id="cpu-cuda", marks=NEEDS_CUDA),
]
BOTH = {"offload_optimizer": HOST, "offload_param": HOST}


def life(device: torch.device, folder: Any, stage: int, zero: dict[str, Any]) -> tuple[list[float], Any]:
    """Built in parts, trained, saved, loaded, read and written, exported and destroyed."""
    settings: dict[str, Any] = {"stage": stage, **WHOLE, "zero_optimization": zero, "gradient_clipping": 0.5}
    settings |= {"gradient_accumulation_steps": 2, "scheduler": {"type": "WarmupLR", "params": {}}}
    losses = []
    for part in range(2):
        with partita.zero.Init(dtype=torch.float32, enabled=stage == 3), torch.device(device):
            model = Deep(3, WIDTH)
        engine = engine_of(model, **settings)
        if part:
            engine.load_checkpoint(folder)
        for step in range(3):
            batch = samples(3 * part + step, 4, width=WIDTH).to(device)
            losses.append(engine.train_batch(batch).item())
        for _ in range(2):
            engine.backward(engine(batch[:2]) * float("nan"))
            engine.step()
        engine.save_checkpoint(folder)
        weight = engine.module.blocks[0].weight
        with partita.zero.GatheredParameters([weight], modifier_rank=0):
            weight.data.mul_(0.5)
        partita.utils.safe_get_full_optimizer_state(weight, "exp_avg")
        engine.save_model(folder / "exported")
        weights = state_of(engine)
        engine.destroy()
    return losses, weights


@pytest.mark.parametrize("stage, zero", [(1, {}), (3, {}), (3, BOTH)], ids=["1", "3", "3, offloaded"])
@pytest.mark.parametrize("device, default", DEFAULTS)
def test_an_engine_names_the_device_of_every_tensor(device, default, stage, zero, tmp_path):
    """A program may set torch's default device, for a model or for all."""
    expected_losses, expected = life(device, tmp_path / "without", stage, zero)
    with default:
        losses, weights = life(device, tmp_path / "with", stage, zero)
    assert losses == expected_losses
    assert_same(weights, expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@on_both_devices
def test_a_pipeline_of_one_process(device, precision):
    """Losses and weights of the whole model on the CPU, up to rounding."""
    seen = []
    for where in (CPU, device):
        model = pipelines.Shape(blocks=2).module(1)
        model.build()
        model.to(where)
        config = pipelines.config_for(4, pipeline={"schedule": "1f1b"}, **pipelines.PRECISIONS[precision])
        engine, *_ = partita.initialize(model=model, config=config)
        losses = []
        for step in range(3):
            data = ([t.to(where) for t in pipelines.micro_batch(step, index)] for index in range(4))
            losses.append(engine.train_batch(data).item())
        seen.append((losses, {name: value.cpu().float() for name, value in engine.module_state_dict().items()}))
        assert engine.device == where
        engine.destroy()
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    assert seen[1][0] == pytest.approx(seen[0][0], rel=tolerance)
    torch.testing.assert_close(seen[1][1], seen[0][1], rtol=tolerance, atol=tolerance)
