"""The engine on a GPU: nobody waits, and the numbers are those of the CPU. Without a GPU the same runs on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from typing import Any

import inside
import partita
import pytest
import torch
from device_runs import FP16, SCHEDULE, SPLIT, STAGES, WHOLE, Net, assert_same, config, engine_on, samples, state_of
from late_streams import on_late_streams
from on_gpu import CPU, CUDA, NEEDS_CUDA, bits, nobody_waits, on_both_devices
from torch import Tensor, nn

# -- promise 3


@pytest.mark.parametrize("precision", [FP16, WHOLE, SPLIT], ids=["fp16", "bf16", "split"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.pairwise
@on_both_devices
def test_twenty_steps_without_waiting(device, stage, precision):
    """Clipping, a schedule, accumulation, recomputed activations, a line with times every 5 steps; after 3 steps of
    warming up."""
    changes = {"gradient_clipping": 0.5, "scheduler": SCHEDULE, "gradient_accumulation_steps": 2, "steps_per_print": 5}
    changes |= {"wall_clock_breakdown": True, "activation_checkpointing": {"enabled": True, "classes": ["Linear"]}}
    engine = engine_on(device, stage=stage, **precision, **changes)
    batches = [samples(step, 4, device) for step in range(23 if device == CUDA else 8)]
    losses = [engine.train_batch(batch) for batch in batches[:3]]
    with nobody_waits(device):
        for batch in batches[3:]:
            losses.append(engine.train_batch(batch))
    assert engine.global_steps == len(batches)
    assert engine.skipped_steps == 0
    assert torch.stack(losses).isfinite().all()
    assert losses[-1].item() < losses[0].item()
    engine.destroy()


@on_both_devices
def test_batches_of_the_host_are_copied_without_waiting(device):
    """train_batch() takes CPU tensors."""
    engine = engine_on(device)
    for step in range(3):
        engine.train_batch(samples(step))
    with nobody_waits(device):
        for step in range(3, 6):
            engine.train_batch(samples(step))
    engine.destroy()


# -- the CPU's numbers


@pytest.mark.parametrize("stage", STAGES)
@on_both_devices
def test_the_engine_equals_stage_0_on_the_cpu(device, stage):
    """Losses, norms, learning rates and weights over 5 steps in fp32, up to the order of sums."""
    seen = []
    for where, which in ((CPU, 0), (device, stage)):
        engine = engine_on(where, stage=which, scheduler=SCHEDULE, gradient_clipping=0.5)
        rows = []
        for step in range(5):
            loss = engine.train_batch(samples(step, device=where)).item()
            rows.append([loss, engine.get_global_grad_norm(), *engine.get_lr()])
        seen.append((torch.tensor(rows), state_of(engine)))
        engine.destroy()
    torch.testing.assert_close(seen[0][0], seen[1][0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(seen[0][1], seen[1][1], rtol=1e-4, atol=1e-5)


# -- split masters, skipped steps


@pytest.mark.parametrize("device, steps", [(CPU, 60), pytest.param(CUDA, 1000, marks=NEEDS_CUDA)], ids=["cpu", "cuda"])
def test_split_masters_have_the_bits_of_whole_ones(device, steps):
    """Losses and parameters; ten of the steps are skipped (N1)."""
    whole, split = (engine_on(device, gradient_clipping=0.5, scheduler=SCHEDULE, **kind) for kind in (WHOLE, SPLIT))
    losses: list[list[Tensor]] = []
    for step in range(steps):
        x = samples(step, device=device)
        row = []
        for engine in (whole, split):
            loss = engine(x)
            engine.backward(loss * float("nan") if step % (steps // 10) == steps // 10 - 1 else loss)
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
@on_both_devices
def test_a_skipped_step_moves_nothing(device, precision):
    """N1, O5: neither weights nor the learning rate; the next step does."""
    engine = engine_on(device, scheduler=SCHEDULE, **precision)
    for step in range(3):  # the schedule begins with two steps at 0
        engine.train_batch(samples(step))
    before, lr = engine.module_state_dict(), engine.get_lr()
    assert lr[0] > 0
    engine.backward(engine(samples(3, device=device)) * float("nan"))
    engine.step()
    assert engine.get_lr() == lr
    assert engine.skipped_steps == 1
    for name, value in engine.module_state_dict().items():
        assert torch.equal(value, before[name]), name
    engine.train_batch(samples(4))
    assert engine.get_lr() != lr
    assert not torch.equal(engine.module_state_dict()["first.weight"], before["first.weight"])
    engine.destroy()


@on_both_devices
def test_a_run_that_only_skips_ends_one_step_later(device):
    """N2: with the number of the last skipped step and the parameter."""
    with nullcontext() if device == CUDA else on_late_streams():
        engine = engine_on(device, max_consecutive_skipped_steps=3)
    for step in range(3):
        engine.backward(engine(samples(step, device=device)) * float("nan"))
        engine.step()
    engine.backward(engine(samples(3, device=device)) * float("nan"))
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
        if not self.on_two or x.device.type != "cuda":
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
@on_both_devices
def test_gradients_of_two_streams_are_all_there(device, stage, overlap):
    """G2: packing waits for the stream that is late. Both layers are in one unit."""
    weights = []
    for make in (TwoStreams, OneStream):
        zero = {"overlap_comm": overlap, "reduce_bucket_size": 1000}
        engine = engine_on(device, make, stage=stage, zero_optimization=zero)
        for step in range(4):
            engine.backward(engine(samples(step, device=device)))
            engine.step()
        weights.append(state_of(engine))
        engine.destroy()
    assert_same(*weights)


def on_another_stream(device: torch.device) -> Any:
    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(stream)


@pytest.mark.parametrize("stage", [0, 3])
@on_both_devices
def test_steps_on_streams_of_the_users(device, stage):
    """Everything follows the current stream, also when that is another one from then on."""
    expected = engine_on(device, stage=stage)
    losses = [expected.train_batch(samples(step)).item() for step in range(6)]
    with on_another_stream(device):
        engine = engine_on(device, stage=stage)
        seen = [engine.train_batch(samples(step)).item() for step in range(3)]
    with on_another_stream(device):
        assert [*seen, *(engine.train_batch(samples(step)).item() for step in range(3, 6))] == losses
    expected.destroy()
    engine.destroy()


# -- devices and transports

WORLD_OF_ONE = """
    import sys
    import partita, torch, torch.distributed as dist
    from one_as_several import native_communicator
    from partita.comm import Reduction
    device, backend = torch.device(sys.argv[1]), sys.argv[2]
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    model = torch.nn.Linear(3, 1).to(device)
    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW"}, "steps_per_print": 0}
    engine = partita.Engine(model, config=config)
    assert dist.get_backend() == backend, dist.get_backend()
    assert engine.device == device
    for _ in range(2):
        engine.backward(engine(torch.ones(2, 3, device=device)).square().mean())
        engine.step()
    assert engine.get_global_grad_norm() > 0
    communicator = native_communicator(device, backend)
    assert communicator.transport == backend, communicator.transport
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


@pytest.mark.parametrize(
    "device, backend", [("cpu", "gloo"), pytest.param("cuda:0", "nccl", marks=NEEDS_CUDA)], ids=["cpu", "cuda"]
)
def test_a_world_of_one_process(python, device, backend):
    """In a process of its own: this one may have a default group of another backend."""
    command = [sys.executable] if device != "cpu" else python.command
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    result = subprocess.run(
        [*command, "-c", textwrap.dedent(WORLD_OF_ONE), device, backend],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("done")


# Where the model is, and where one of its tensors is instead.
APART = pytest.mark.parametrize(
    "device, wrong", [(CPU, "meta"), pytest.param(CUDA, "cpu", marks=NEEDS_CUDA)], ids=["cpu", "cuda"]
)


@pytest.mark.parametrize("trained", [True, False])
@APART
def test_a_parameter_on_another_device_is_named(device, wrong, trained):
    """Promise 7."""
    model = Net().to(device)
    model.last.bias = nn.Parameter(torch.zeros(5, device=wrong), requires_grad=trained)
    with pytest.raises(ValueError, match=rf"parameter 'last\.bias' is on device '{wrong}', the model on '{device}'"):
        partita.Engine(model, config=config())


@APART
def test_a_buffer_on_another_device_is_named(device, wrong):
    """Promise 7."""
    model = Net().to(device)
    model.register_buffer("running", torch.zeros(5, device=wrong))
    with pytest.raises(ValueError, match=rf"buffer 'running' is on device '{wrong}', the model on '{device}'"):
        partita.Engine(model, config=config())
