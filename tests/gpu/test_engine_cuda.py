"""The engine and the kernels on a CUDA device: nobody waits, and the numbers are those of the CPU."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import inside
import partita
import pytest
import torch
from one_part import adam
from partita import _core
from partita._core import AdamGroup, Segments
from partita.device import kernels
from torch import Tensor, nn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
STAGES = (0, 1, 2)
WHOLE: dict[str, Any] = {"bf16": {"enabled": True}}
SPLIT: dict[str, Any] = {"bf16": {"enabled": True, "master_weights": "split"}}
FP16: dict[str, Any] = {"fp16": {"enabled": True, "initial_scale_power": 8}}
SCHEDULE = {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_max_lr": 0.01, "warmup_type": "linear"}}


class Net(nn.Module):
    """Odd sizes, a parameter of one element and one of none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(9, 37)
        self.nothing = nn.Parameter(torch.empty(0))
        self.scale = nn.Parameter(torch.ones(1))
        self.last = nn.Linear(37, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x.to(self.scale.dtype))) * self.scale
        return (self.last(hidden).float() - x[:, :5]).square().mean() + self.nothing.sum()


def config(stage: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 200},
        "steps_per_print": 0,
        **changes,
    }


def engine_on(device: torch.device, make: type[nn.Module] = Net, **settings: Any) -> partita.Engine:
    return partita.Engine(make().to(device), config=config(**settings))


def samples(step: int, count: int = 2, device: torch.device = CUDA) -> Tensor:
    return torch.randn(count, 9, generator=torch.Generator().manual_seed(step)).to(device)


@contextmanager
def nobody_waits() -> Iterator[None]:
    """torch raises for whatever makes the host wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -- promise 3


@pytest.mark.parametrize("precision", [FP16, WHOLE, SPLIT], ids=["fp16", "bf16", "split"])
@pytest.mark.parametrize("stage", STAGES)
def test_twenty_steps_without_waiting(stage, precision):
    """Clipping, a schedule, accumulation, a line every 5 steps; after 3 steps of warming up."""
    changes = {"gradient_clipping": 0.5, "scheduler": SCHEDULE, "gradient_accumulation_steps": 2, "steps_per_print": 5}
    engine = engine_on(CUDA, stage=stage, **precision, **changes)
    batches = [samples(step, 4) for step in range(23)]
    losses = [engine.train_batch(batch) for batch in batches[:3]]
    with nobody_waits():
        for batch in batches[3:]:
            losses.append(engine.train_batch(batch))
    assert engine.global_steps == 23
    assert engine.skipped_steps == 0
    assert torch.stack(losses).isfinite().all()
    assert losses[-1].item() < losses[0].item()
    engine.destroy()


def test_batches_of_the_host_are_copied_without_waiting():
    """train_batch() takes CPU tensors."""
    engine = engine_on(CUDA)
    for step in range(3):
        engine.train_batch(samples(step, device=CPU))
    with nobody_waits():
        for step in range(3, 6):
            engine.train_batch(samples(step, device=CPU))
    engine.destroy()


# -- the CPU's numbers


@pytest.mark.parametrize("stage", STAGES)
def test_the_engine_equals_the_engine_on_the_cpu(stage):
    """Losses, norms, learning rates and weights over 5 steps in fp32, up to the order of sums."""
    seen = []
    for device in (CPU, CUDA):
        engine = engine_on(device, stage=stage, scheduler=SCHEDULE, gradient_clipping=0.5)
        rows = []
        for step in range(5):
            loss = engine.train_batch(samples(step, device=device)).item()
            rows.append([loss, engine.get_global_grad_norm(), *engine.get_lr()])
        seen.append((torch.tensor(rows), {n: v.cpu() for n, v in engine.module_state_dict().items()}))
        engine.destroy()
    torch.testing.assert_close(seen[0][0], seen[1][0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(seen[0][1], seen[1][1], rtol=1e-4, atol=1e-5)


SIZES = (0, 1, 7, 8, 9, 255, 1000, 65537)
DTYPES = tuple(kernels.DTYPES)


def values(numel: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().view(torch.int16 if tensor.dtype.itemsize == 2 else torch.int32)


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


# -- split masters, skipped steps


def test_split_masters_have_the_bits_of_whole_ones_over_a_thousand_steps():
    """Losses and parameters; every 100th step is skipped (N1)."""
    whole, split = (engine_on(CUDA, gradient_clipping=0.5, scheduler=SCHEDULE, **kind) for kind in (WHOLE, SPLIT))
    losses: list[list[Tensor]] = []
    for step in range(1000):
        x = samples(step)
        row = []
        for engine in (whole, split):
            loss = engine(x)
            engine.backward(loss * float("nan") if step % 100 == 99 else loss)
            engine.step()
            row.append(loss.detach())
        losses.append(row)
    assert torch.equal(*torch.tensor([[a.item(), b.item()] for a, b in losses]).T)
    assert whole.skipped_steps == split.skipped_steps == 10
    for (name, p), q in zip(whole.module.named_parameters(), split.module.parameters(), strict=True):
        assert torch.equal(bits(p.detach()), bits(q.detach())), name
    for a, b in zip(inside.units(whole), inside.units(split), strict=True):
        for slot in a.layout.slots:
            part = slice(slot.offset, slot.offset + slot.numel)
            assert torch.equal(bits(a.full_precision()[part]), bits(b.full_precision()[part])), slot.name


@pytest.mark.parametrize("precision", [{}, FP16, WHOLE, SPLIT], ids=["fp32", "fp16", "bf16", "split"])
def test_a_skipped_step_moves_nothing(precision):
    """N1, O5: neither weights nor the learning rate; the next step does."""
    engine = engine_on(CUDA, scheduler=SCHEDULE, **precision)
    for step in range(3):  # the schedule begins with two steps at 0
        engine.train_batch(samples(step))
    before, lr = engine.module_state_dict(), engine.get_lr()
    assert lr[0] > 0
    engine.backward(engine(samples(3)) * float("nan"))
    engine.step()
    assert engine.get_lr() == lr
    assert engine.skipped_steps == 1
    for name, value in engine.module_state_dict().items():
        assert torch.equal(value, before[name]), name
    engine.train_batch(samples(4))
    assert engine.get_lr() != lr
    assert not torch.equal(engine.module_state_dict()["first.weight"], before["first.weight"])
    engine.destroy()


def test_a_run_that_only_skips_ends_one_step_later():
    """N2: with the number of the last skipped step and the parameter."""
    engine = engine_on(CUDA, max_consecutive_skipped_steps=3)
    for step in range(3):
        engine.backward(engine(samples(step)) * float("nan"))
        engine.step()
    engine.backward(engine(samples(3)) * float("nan"))
    with pytest.raises(FloatingPointError, match=r"step 3: 3 steps in a row.*rank 0, first in parameter '\w"):
        engine.step()
    engine.destroy()


# -- streams


class _SlowBackward(torch.autograd.Function):
    """Holds up the stream of its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        torch.cuda._sleep(20_000_000)  # some 10 ms
        return grad


class TwoStreams(nn.Module):
    """Half of the model on a stream of its own, whose backward is late."""

    on_two = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left = nn.Linear(9, 5)
        self.right = nn.Linear(9, 5)
        self.side: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.on_two:
            return (self.left(x) - self.right(x)).square().mean()
        self.side = self.side or torch.cuda.Stream()
        main = torch.cuda.current_stream()
        self.side.wait_stream(main)
        with torch.cuda.stream(self.side):
            left = _SlowBackward.apply(self.left(x))
        x.record_stream(self.side)
        right = self.right(x)
        main.wait_stream(self.side)
        left.record_stream(main)
        return (left - right).square().mean()


class OneStream(TwoStreams):
    on_two = False


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_of_two_streams_are_all_there(stage, overlap):
    """G2: packing waits for the stream that is late. Both layers are in one unit."""
    weights = []
    for make in (TwoStreams, OneStream):
        engine = engine_on(CUDA, make, zero_optimization={"stage": stage, "overlap_comm": overlap})
        for step in range(4):
            engine.backward(engine(samples(step)))
            engine.step()
        weights.append(engine.module_state_dict())
        engine.destroy()
    for name, value in weights[1].items():
        assert torch.equal(weights[0][name], value), name


def test_steps_on_a_stream_of_the_users():
    """Everything follows the current stream."""
    expected = engine_on(CUDA)
    losses = [expected.train_batch(samples(step)).item() for step in range(4)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        engine = engine_on(CUDA)
        assert [engine.train_batch(samples(step)).item() for step in range(4)] == losses


# -- devices and transports

NCCL = """
    import partita, torch, torch.distributed as dist
    from partita.comm import Reduction, TorchCommunicator
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    model = torch.nn.Linear(3, 1).cuda()
    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW"}, "steps_per_print": 0}
    engine = partita.Engine(model, config=config)
    assert dist.get_backend() == "nccl", dist.get_backend()
    assert engine.device == torch.device("cuda", torch.cuda.current_device())
    for _ in range(2):
        engine.backward(engine(torch.ones(2, 3, device="cuda")).square().mean())
        engine.step()
    assert engine.get_global_grad_norm() > 0
    communicator = TorchCommunicator(dist.group.WORLD, engine.device)
    assert communicator.transport == "nccl", communicator.transport
    buffer = communicator.empty(8, torch.float32).fill_(2.0)
    assert buffer.device == engine.device
    communicator.all_reduce(buffer).wait()
    communicator.all_reduce(buffer, Reduction.average).wait()
    communicator.reduce_scatter(buffer).wait()
    communicator.all_gather(buffer).wait()
    communicator.broadcast(buffer, 0).wait()
    communicator.barrier()
    assert buffer.tolist() == [2.0] * 8
    engine.destroy()
    dist.destroy_process_group()
    print("done")
"""


def test_a_world_of_one_process_over_nccl():
    """In a process of its own: this one may have a default group of another backend."""
    command = [sys.executable, "-c", textwrap.dedent(NCCL)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("done")


@pytest.mark.parametrize("trained", [True, False])
def test_a_parameter_on_another_device_is_named(trained):
    """Promise 7."""
    model = Net().to(CUDA)
    model.last.bias = nn.Parameter(torch.zeros(5), requires_grad=trained)
    with pytest.raises(ValueError, match=r"parameter 'last\.bias' is on device 'cpu', the model on 'cuda:0'"):
        partita.Engine(model, config=config())


def test_a_buffer_on_another_device_is_named():
    """Promise 7."""
    model = Net().to(CUDA)
    model.register_buffer("running", torch.zeros(5))
    with pytest.raises(ValueError, match=r"buffer 'running' is on device 'cpu', the model on 'cuda:0'"):
        partita.Engine(model, config=config())


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
