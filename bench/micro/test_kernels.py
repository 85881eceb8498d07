"""The native kernels against a copy of the same bytes and against the fastest others, in turns within one run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from partita import _core
from partita.device import kernels
from partita.device.memory import flat_buffer
from torch import Tensor
from turns import Action, time_in_turns

NUMEL = 40_000_000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SEGMENTS = _core.Segments([(0, NUMEL, 0)])


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n}-threads")
def threads(request: pytest.FixtureRequest) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def copy_of(bytes_moved: int) -> Action:
    """A copy that reads and writes `bytes_moved` in all."""
    source = flat_buffer(bytes_moved // 8, torch.float32).zero_()
    destination = flat_buffer(bytes_moved // 8, torch.float32).zero_()
    return lambda: destination.copy_(source)


def in_turns(benchmark: Any, bytes_moved: int, ours: Action, peers: dict[str, Action]) -> None:
    """Times `ours` beside `peers` and beside a copy of as many bytes."""
    time_in_turns(benchmark, bytes_moved, ours, {"copy": copy_of(bytes_moved), **peers})


def filled(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """A flat buffer as the engine has them."""
    return flat_buffer(NUMEL, dtype).fill_(value)


def torch_fused() -> Action:
    """torch's AdamW on one fp32 parameter, in memory that torch allocates."""
    parameter = torch.nn.Parameter(torch.zeros(NUMEL))
    parameter.grad = torch.full_like(parameter, 1e-3)
    return torch.optim.AdamW([parameter], fused=True).step


def torch_fused_in_flat_buffers() -> Action:
    """The same in the memory that ours has."""
    parameter = torch.nn.Parameter(filled(0.0))
    parameter.grad = filled(1e-3)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    optimizer.state[parameter] = {"step": torch.tensor(10.0), "exp_avg": filled(0.0), "exp_avg_sq": filled(0.0)}
    return optimizer.step


def deepspeed_cpu_adam() -> Action | None:
    """DeepSpeedCPUAdam, fp32; None when DeepSpeed is not installed or cannot compile its extension."""
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        parameter = torch.nn.Parameter(torch.zeros(NUMEL))
        parameter.grad = torch.full_like(parameter, 1e-3)
        step: Action = DeepSpeedCPUAdam([parameter]).step
        step()
    except Exception as error:
        print(f"DeepSpeedCPUAdam is not to be had: {error}")
        return None
    return step


@pytest.mark.parametrize(("dtype", "splits"), [*((dtype, False) for dtype in DTYPES), ("bf16", True)])
def test_adam(benchmark: Any, threads: int, dtype: str, splits: bool) -> None:
    """28 bytes per parameter: in fp32 16 read and 12 written, with 16-bit gradients and weights 14 and 14.

    26 with split masters: 14 read and 12 written.
    """
    grads = filled(1e-3, DTYPES[dtype])
    master = None if splits else filled(0.0)
    remainder = torch.zeros(NUMEL, dtype=torch.int16) if splits else None
    exp_avg, exp_avg_sq = filled(0.0), filled(0.0)
    params = None if dtype == "fp32" else filled(0.0, DTYPES[dtype])
    control = torch.zeros(_core.StepControl.nbytes, dtype=torch.uint8)
    _core.StepControl(grad_norm=1.0, grad_scale=1.0, skip=False, step=10).write(control.data_ptr())
    group = _core.AdamGroup(1e-3, 0.9, 0.999, 1e-8, 0.01, True)

    part = kernels.adam_part(
        grads=grads,
        master=master,
        remainder=remainder,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        params=params,
        segments=SEGMENTS,
    )

    peers: dict[str, Action] = {}
    if dtype == "fp32":
        peers["torch fused AdamW"] = torch_fused()
        peers["the same in our memory"] = torch_fused_in_flat_buffers()
        if (peer := deepspeed_cpu_adam()) is not None:
            peers["DeepSpeedCPUAdam"] = peer
    in_turns(benchmark, (26 if splits else 28) * NUMEL, lambda: kernels.adam([part], [group], control), peers)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(benchmark: Any, threads: int, dtype: str) -> None:
    """Reads every element once."""
    values = filled(1e-3, DTYPES[dtype])
    total = torch.zeros(1, dtype=torch.float64)
    in_turns(
        benchmark,
        NUMEL * values.element_size(),
        lambda: kernels.sum_of_squares(total, [kernels.norm_part(values, SEGMENTS)]),
        {"torch vector_norm": lambda: torch.linalg.vector_norm(values)},
    )


@pytest.mark.parametrize("accumulate", [False, True], ids=["write", "accumulate"])
@pytest.mark.parametrize(("source", "destination"), [("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32")])
def test_pack(benchmark: Any, threads: int, source: str, destination: str, accumulate: bool) -> None:
    """100 tensors into a flat buffer: source read, destination written, and read too when accumulating."""
    flat = filled(0.0, DTYPES[destination])
    tensors = [torch.zeros(NUMEL // 100, dtype=DTYPES[source]) for _ in range(100)]
    spans = [kernels.span(t) for t in tensors]
    offsets = [i * (NUMEL // 100) for i in range(100)]
    views = list(flat.split(NUMEL // 100))

    def by_torch() -> None:
        if accumulate:
            torch._foreach_add_(views, [t.to(flat.dtype) for t in tensors])
        else:
            torch._foreach_copy_(views, tensors)

    per_element = tensors[0].element_size() + flat.element_size() * (2 if accumulate else 1)
    in_turns(
        benchmark,
        NUMEL * per_element,
        lambda: kernels.pack(flat, spans, offsets, scale=1.0, accumulate=accumulate),
        {"torch foreach": by_torch},
    )
