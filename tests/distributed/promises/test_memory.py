"""Peak memory of the model states in every stage, against the bytes per parameter that the README states."""

from __future__ import annotations

import partita
import pytest
import torch
from communicators import communicating_through
from memory import peak_growth
from ranks import RankPool
from torch import nn

WIDTH, LAYERS = 1024, 96
STATES = {  # bytes per parameter on 2 ranks: parameters + gradients + optimizer states
    ("fp32", 0): 4 + 4 + 8,
    ("fp32", 1): 4 + 4 + 8 / 2,
    ("fp32", 2): 4 + 4 / 2 + 8 / 2,
    ("bf16", 0): 2 + 2 + 12,
    ("bf16", 1): 2 + 2 + 12 / 2,
    ("bf16", 2): 2 + 2 / 2 + 12 / 2,
    ("split", 0): 2 + 2 + 10,
    ("fp32", 3): (4 + 4 + 8) / 2,
    ("bf16", 3): (2 + 2 + 12) / 2,
}
# Each stage and each precision once; the others run in `make test-all`, for they take long.
OFTEN = [("split", 0), ("fp32", 1), ("bf16", 2), ("fp32", 3)]
CASES = [pytest.param(*case, marks=[] if case in OFTEN else pytest.mark.slow) for case in STATES]


def _train(engine: partita.Engine, dtype: torch.dtype, steps: int) -> None:
    for _ in range(steps):
        engine.backward(engine(torch.ones(1, engine.module[0].in_features, dtype=dtype)).float().square().mean())
        engine.step()


def _config(stage: int, precision: str) -> dict[str, object]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        # In stage 3, where parameters are gathered, one layer and the next.
        "zero_optimization": {"stage": stage, "reduce_bucket_size": WIDTH * WIDTH, "stage3_prefetch_bucket_size": 0},
        "steps_per_print": 0,
        "bf16": {"enabled": precision != "fp32", "master_weights": "split" if precision == "split" else "fp32"},
    }


def _model(width: int, layers: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))


def _peak_bytes_per_parameter(stage: int, precision: str) -> float:
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    small = partita.Engine(model=_model(64, 2), config=_config(stage, precision))
    _train(small, dtype, 2)  # what libraries allocate once is not the model's
    small.destroy()
    with communicating_through(lambda real: real) as communicator, peak_growth(communicator) as peak:
        engine = partita.Engine(model=_model(WIDTH, LAYERS), config=_config(stage, precision))
        _train(engine, dtype, 3)
    engine.destroy()
    return peak[0] / (LAYERS * WIDTH * WIDTH)


@pytest.mark.parametrize(("precision", "stage"), CASES)
def test_peak_memory_is_the_formula(precision, stage, transport, monkeypatch):
    """F7's bound: 10 % above what the states need, two units of staging and all activations included.

    Without torch's flight recorder: it keeps a few small blocks per collective of gloo, for 2,000 collectives. Where
    those land in malloc's heap is a matter of timing, and some gradients' freed memory then fits no other gradient.
    """
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "0")
    pool = RankPool(2, transport, fresh=True)  # what an allocator kept from other tests would hide the peak
    peaks = pool.run(_peak_bytes_per_parameter, stage, precision)
    pool.close()
    expected = STATES[precision, stage]
    print(f"{precision} stage {stage}: {max(peaks):.2f} bytes per parameter, formula {expected:.2f}")
    assert 0.9 * expected <= min(peaks)
    if transport == "torch" and (precision, stage) == ("fp32", 3) and max(peaks) > 1.1 * expected:
        assert max(peaks) <= 1.1 * (expected + 4)  # every layer once
        # In glibc 2.36, memory that torch frees (it is aligned) does not serve for an equal request.
        # MALLOC_MMAP_THRESHOLD_=1048576 (8.3 bytes) or trimming (8.5) cost a GPT step over gloo a fifth of its time.
        pytest.xfail("malloc keeps freed layers of 4 MiB: 12 bytes per parameter")
    assert max(peaks) <= 1.1 * expected
