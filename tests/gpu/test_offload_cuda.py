"""Offload from a GPU: the bits of a resident run, pinned memory, and a model on the CPU that leaves GPUs alone."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import inside
import pytest
import torch
from device_runs import FP16, HOST, SPLIT, WHOLE, Deep, assert_same, engine_of, samples, state_of
from on_gpu import NEEDS_CUDA, on_both_devices

WIDTH = 24
WIDE = 256  # buffers of this are large enough for pages of their own
OFFLOADS: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {"offload_optimizer": HOST}),
    "2": (2, {"offload_optimizer": HOST}),
    "2, half": (2, {"offload_optimizer": {**HOST, "ratio": 0.5}}),
    "3": (3, {"offload_optimizer": HOST}),
    "3, not pinned": (3, {"offload_optimizer": {**HOST, "pin_memory": False}}),
    "3, parameters": (3, {"offload_param": HOST}),
    "3, both": (3, {"offload_optimizer": HOST, "offload_param": HOST}),
}
SGD = {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}}


def trained(device: torch.device, stage: int, zero: dict[str, Any], **changes: Any) -> tuple[list[float], Any]:
    """Losses and weights of six steps of two micro-batches with clipping; the third one is skipped."""
    zero = {"reduce_bucket_size": 700, "stage3_prefetch_bucket_size": 700, **zero}
    shared: dict[str, Any] = {"gradient_accumulation_steps": 2, "gradient_clipping": 0.5}
    engine = engine_of(Deep(4, WIDTH).to(device), stage=stage, zero_optimization=zero, **shared, **changes)
    losses = []
    for step in range(6):
        for micro in range(2):
            loss = engine(samples(10 * step + micro, 2, device, WIDTH))
            engine.backward(loss * float("inf") if step == 2 and micro else loss)
            engine.step()
            losses.append(loss.detach())
    assert engine.skipped_steps == 1
    seen = [loss.item() for loss in losses], state_of(engine)
    engine.destroy()
    return seen


@pytest.mark.parametrize("optimizer", [None, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("precision", [{}, WHOLE, SPLIT, FP16], ids=["fp32", "bf16", "split", "fp16"])
@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.pairwise
@on_both_devices
def test_an_offloaded_run_has_the_bits_of_a_resident_one(device, offload, precision, optimizer):
    if precision == SPLIT and optimizer is not None:
        pytest.skip("torch's optimizers need whole masters")
    changes = precision if optimizer is None else {**precision, "optimizer": optimizer}
    stage, zero = OFFLOADS[offload]
    losses, weights = trained(device, stage, zero, **changes)
    expected_losses, expected = trained(device, stage, {}, **changes)
    assert losses == expected_losses
    assert_same(weights, expected)


@pytest.mark.parametrize("pin", [True, False])
@on_both_devices
def test_what_is_on_the_host_is_pinned_where_the_config_says_so(device, pin):
    where = {"device": "cpu", "pin_memory": pin}
    zero = {"offload_optimizer": where, "offload_param": where}
    with inside.noting_host_buffers() as buffers:
        engine = engine_of(Deep(2, WIDE).to(device), stage=3, zero_optimization=zero, **WHOLE)
    engine.train_batch(samples(0, 2, device, WIDE))
    assert buffers
    for buffer in buffers:
        assert buffer.device.type == "cpu"
        assert buffer.is_pinned() == (pin and device.type == "cuda")
    engine.destroy()


ON_THE_CPU = """
import torch
from device_runs import HOST, Deep, engine_of, samples

zero = {"offload_optimizer": HOST, "offload_param": HOST}
engine = engine_of(Deep(2, 8), stage=3, zero_optimization=zero)
engine.train_batch(samples(0, 2, width=8))
engine.destroy()
assert not torch.cuda.is_initialized()
"""


@pytest.mark.parametrize("there_is_one", [False, pytest.param(True, marks=NEEDS_CUDA)])
def test_a_model_on_the_cpu_touches_no_gpu(python, there_is_one):
    """Pinned memory would need a context there, of hundreds of MiB, on GPU 0."""
    command = [sys.executable] if there_is_one else python.command
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([*command, "-c", ON_THE_CPU], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
