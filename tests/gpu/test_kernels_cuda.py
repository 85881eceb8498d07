"""The kernels on a CUDA device: the bits of the CPU, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from on_gpu import CPU, CUDA, NEEDS_CUDA, bits
from one_part import adam
from partita import _core
from partita._core import AdamGroup, Segments
from partita.device import kernels
from partita.device.capability import prepare_kernels
from partita.optim import FusedAdam
from torch import Tensor

pytestmark = NEEDS_CUDA

SIZES = (0, 1, 7, 8, 9, 255, 1000, 65537)
DTYPES = tuple(kernels.DTYPES)


def values(numel: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("from_", DTYPES)
@pytest.mark.parametrize("numel", SIZES)
def test_cast_has_the_cpus_bits(numel, from_, to):
    for scale, accumulate in ((1 / 3, False), (0.5, True)):  # 0.5: exact, fused with the addition or not
        results = []
        for device in (CPU, CUDA):
            destination = values(numel, to, 1).to(device)
            kernels.cast(destination, values(numel, from_).to(device), scale=scale, accumulate=accumulate)
            results.append(bits(destination))
        assert torch.equal(*results)


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("from_", DTYPES)
@pytest.mark.parametrize("factor", [None, 256.0])
def test_pack_has_the_cpus_bits(from_, to, factor):
    results = []
    for device in (CPU, CUDA):
        sources = [values(n, from_, n).to(device) for n in SIZES]
        offsets = [3 + sum(SIZES[:i]) for i in range(len(SIZES))]
        for scale, accumulate in ((1 / 3, False), (0.5, True)):
            destination = values(sum(SIZES) + 8, to, 1).to(device)
            kernels.pack(
                destination,
                [kernels.span(s) for s in sources],
                offsets,
                scale=scale,
                factor=None if factor is None else torch.tensor([factor], dtype=torch.float64, device=device),
                accumulate=accumulate,
            )
            results.append(bits(destination))
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


def random_bits(numel: int) -> Tensor:
    """Every class of numbers, NaN and subnormals too."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(-(2**31), 2**31, (numel,), generator=generator).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("numel", SIZES)
def test_splitting_and_joining_have_the_cpus_bits(numel):
    master = random_bits(numel)
    results = []
    for device in (CPU, CUDA):
        params = torch.zeros(numel, dtype=torch.bfloat16, device=device)
        remainder = torch.zeros(numel, dtype=torch.int16, device=device)
        joined = torch.zeros(numel, device=device)
        kernels.split_master(params, master.to(device), remainder)
        kernels.join_master(joined, params, remainder)
        results.append((bits(params), remainder.cpu(), bits(joined), joined.cpu()))
    real = ~master.isnan()
    for cpu, cuda in zip(results[0][:3], results[1][:3], strict=True):
        assert torch.equal(cpu[real], cuda[real])
    assert torch.equal(results[1][2][real], bits(master)[real])
    assert bool(results[1][3][~real].isnan().all())


def control_on(device: torch.device, step: int, *, skip: bool = False) -> Tensor:
    memory = torch.zeros(_core.StepControl.nbytes, dtype=torch.uint8)
    _core.StepControl(grad_norm=0.0, grad_scale=0.5, skip=skip, step=step).write(memory.data_ptr())
    return memory.to(device)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16", "split"])
@pytest.mark.parametrize("grads", DTYPES)
@pytest.mark.parametrize("numel", SIZES)
def test_adam_has_the_cpus_bits(numel, grads, kind):
    """Weights, moments and remainder over three steps, one of them skipped, in two groups."""
    cut = numel // 3
    rows = [(0, cut, 0), (cut, numel - cut, 1)]
    groups = [AdamGroup(1e-2, 0.8, 0.99, 1e-6, 0.1, True), AdamGroup(3e-3, 0.9, 0.999, 1e-8, 0.1, False)]
    results = []
    for device in (CPU, CUDA):
        master: Tensor | None = values(numel).to(device)
        dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(kind, torch.bfloat16)
        params = None if kind == "fp32" else torch.zeros(numel, dtype=dtype, device=device)
        remainder = torch.zeros(numel, dtype=torch.int16, device=device) if kind == "split" else None
        if params is not None and master is not None:
            kernels.split_master(params, master, remainder)
        if kind == "split":
            master = None
        moments = [torch.zeros(numel, device=device), torch.zeros(numel, device=device)]
        for step in (1, 2, 3):
            adam(
                grads=values(numel, grads, step).to(device),
                master=master,
                remainder=remainder,
                exp_avg=moments[0],
                exp_avg_sq=moments[1],
                params=params,
                segments=Segments([row for row in rows if row[1]]),
                groups=groups,
                control=control_on(device, step, skip=step == 2),
            )
        kept = [t for t in (master, params, *moments) if t is not None]
        results.append([bits(t) for t in kept] + ([remainder.cpu()] if remainder is not None else []))
    for cpu, cuda in zip(*results, strict=True):
        assert torch.equal(cpu, cuda)


def test_the_norm_is_that_of_the_cpu_and_the_same_every_time():
    tensor, segments = values(100_001), Segments([(0, 50_000, 0), (50_010, 49_000, 0)])
    totals = []
    for device in (CPU, CUDA, CUDA):
        total = torch.zeros(1, dtype=torch.float64, device=device)
        kernels.sum_of_squares(total, [kernels.norm_part(tensor.to(device), segments)])
        totals.append(total.item())
    assert totals[1] == totals[2]
    assert totals[1] == pytest.approx(totals[0], rel=1e-12)


def test_the_loss_scale_moves_as_on_the_cpu():
    """Control block and state after each of a row of steps: growth, overflow by inf and NaN, the minimum."""
    scaler = _core.LossScaler(
        dynamic=True, initial_scale=8.0, minimum=1.0, window=2, hysteresis=1, consecutive_hysteresis=False
    )
    inf, nan = float("inf"), float("nan")
    runs = []
    for device in (CPU, CUDA):
        memory = torch.zeros(_core.LossScaleState.nbytes, dtype=torch.uint8)
        scaler.initial().write(memory.data_ptr())
        state = memory.to(device)
        control = torch.zeros(_core.StepControl.nbytes, dtype=torch.uint8, device=device)
        rows = []
        for square in (4.0, 1e10, 3.0, inf, 2.0, nan, inf, inf, inf, inf, 5.0):
            total = torch.tensor([square], dtype=torch.float64, device=device)
            kernels.loss_scale_update(control, state, scaler, total, mean=0.25, clip=0.5)
            control_then, state_then = control.cpu(), state.cpu()
            c = _core.StepControl.read(control_then.data_ptr())
            s = _core.LossScaleState.read(state_then.data_ptr())
            counters = (s.applied_steps, s.skipped_steps, s.good_steps, s.hysteresis, s.consecutive_skips)
            rows.append(repr((c.grad_norm, c.grad_scale, c.skip, c.step, s.scale, *counters, s.at_minimum)))
        runs.append(rows)
    assert runs[0] == runs[1]


# -- refusals


@pytest.mark.parametrize("wrong", ["destination", "source"])
def test_kernels_refuse_tensors_of_two_devices(wrong):
    """Promise 7: and do not read addresses of the other one."""
    tensors = {"destination": torch.zeros(4, device=CUDA), "source": torch.zeros(4, device=CUDA)}
    tensors[wrong] = tensors[wrong].cpu()
    with pytest.raises(ValueError, match=r"'cpu'.*'cuda:0'|'cuda:0'.*'cpu'"):
        kernels.cast(**tensors)


def test_a_control_block_on_the_host_is_refused():
    """Promise 7: the device would read it."""
    ones = [torch.ones(8, device=CUDA) for _ in range(4)]
    with pytest.raises(ValueError, match="control is on device 'cpu'"):
        adam(
            grads=ones[0],
            master=ones[1],
            exp_avg=ones[2],
            exp_avg_sq=ones[3],
            params=None,
            segments=Segments([(0, 8, 0)]),
            groups=[AdamGroup(1e-2, 0.9, 0.999, 1e-8, 0.0, True)],
            control=control_on(CPU, 1),
        )


# -- before anything runs


def test_all_kernels_are_loaded_and_fit_to_the_device():
    prepare_kernels.cache_clear()
    prepare_kernels(CUDA)
    assert _core.load_cuda_kernels(CUDA.index or 0) > 50
    assert _core.cuda_architectures()


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_adam_has_the_cpus_bits(dtype):
    """Gradients that are elsewhere in each step, parameters without one, a number of steps for each."""
    results = []
    for device in (CPU, CUDA):
        parameters = [torch.nn.Parameter(values(n, dtype, n).to(device)) for n in SIZES]
        optimizer = FusedAdam(parameters, lr=1e-2, weight_decay=0.1)
        for step in range(5):
            optimizer.zero_grad(set_to_none=True)
            for i, parameter in enumerate(parameters):
                if (step + i) % 4:
                    parameter.grad = values(parameter.numel(), dtype, 100 * step + i).to(device)
            optimizer.step()
        states = [optimizer.state[p] for p in parameters]
        results.append([bits(p.detach()) for p in parameters] + [bits(s["exp_avg_sq"]) for s in states])
    for cpu, cuda in zip(*results, strict=True):
        assert torch.equal(cpu, cuda)
