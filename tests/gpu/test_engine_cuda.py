"""The engine on a CUDA device: nobody waits, and the numbers are those of the CPU."""

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
from on_gpu import CPU, CUDA, NEEDS_CUDA, bits
from torch import Tensor, nn

pytestmark = NEEDS_CUDA

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
