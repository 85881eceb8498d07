"""Promise 3: between two steps the host waits for nothing but the decision about the step before."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import inside
import partita
import pytest
import torch
from communicators import Wrapped, communicating_through, world_communicator_by_default
from late_streams import LateStreams, on_late_streams
from no_waits import HostWaitError, refusing_host_waits
from partita.device import HOST
from small_models import config, inputs, seeded
from torch import Tensor, nn

SCHEDULE = {"type": "WarmupLR", "params": {"warmup_num_steps": 6, "warmup_max_lr": 0.1}}
FP16 = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1, "loss_scale_window": 2}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"fp16": FP16},
    "bf16": {"bf16": {"enabled": True}},
    "split": {"bf16": {"enabled": True, "master_weights": "split"}},
}


class Small(nn.Module):
    """Repeated layers, statistics that differ between ranks, and parameters that are not used."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.unused = nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.lerp_(x.mean(0), 0.1)
        for layer in self.layers:
            x = x + torch.tanh(layer(x.to(layer.weight.dtype)))
        return x.float().pow(2).mean()


class AsOverNccl(Wrapped):
    """Of a device that is not the host, and does not know who waits."""

    device = torch.device("cpu")  # not the object HOST


def _config(stage: int, precision: str, folder: Path) -> dict[str, Any]:
    """Whatever may run in a step, but what says that the host waits."""
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "scheduler": SCHEDULE,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 150,
            "stage3_param_persistence_threshold": 0,
            "overlap_gather": stage == 1,
        },
        "steps_per_print": 1,
        "wall_clock_breakdown": True,
        "memory_breakdown": True,
        "comms_logger": {"enabled": True, "verbose": True},
        "monitor": {"dir": str(folder / "monitor")},
        "checkpoint": {"dir": str(folder / "saved"), "interval_steps": 1000},
        **PRECISIONS[precision],
    }


def _train(config: dict[str, Any], transport: str, steps: int = 6) -> list[int]:
    """Trains without a wait, with a skipped step; returns the number of waits for copies in each step."""
    with (
        inside.with_connect(world_communicator_by_default(transport)),
        communicating_through(AsOverNccl),
        on_late_streams() as streams,
    ):
        torch.manual_seed(1)
        engine = partita.Engine(model=Small(), config=config)
        count = engine.gradient_accumulation_steps()
        batches = [torch.randn(4, 8, dtype=torch.float32) for _ in range(count * steps)]
        batches[2 * count].fill_(float("inf"))
        waits = []
        streams.waits()
        for step in range(steps):
            # In the first step ranks agree on the order of gathers, and on what arrived late.
            with nullcontext() if step == 0 else refusing_host_waits():
                for batch in batches[step * count : (step + 1) * count]:
                    engine.backward(engine(batch))
                    engine.step()
            waits.append(len(streams.waits()))
        engine.destroy()
    return waits


@pytest.mark.parametrize(
    ("world_size", "stage", "precision", "over"),
    [
        *((1, 0, "bf16", "auto"), (2, 0, "fp32", "auto"), (2, 1, "bf16", "torch"), (2, 2, "split", "torch")),
        *((2, 3, "bf16", "torch"), (2, 3, "fp16", "auto")),
    ],
)
def test_a_step_waits_for_the_decision_about_the_one_before_only(ranks, tmp_path, world_size, stage, precision, over):
    """What the host reads came by copies. Beside the decision it reads what comparisons of buffers and of weights have
    found, a step after they were made."""
    config = _config(stage, precision, tmp_path)
    for waits in ranks(world_size).run(_train, config, over):
        assert waits[0] == 0 and waits[-1] == 1
        assert max(waits) <= 3


def test_the_norm_is_there_without_a_wait():
    with on_late_streams() as streams:
        engine = partita.Engine(seeded(), config=config(gradient_clipping=1e-3))
        assert engine.grad_norm_tensor().isnan()
        norms = []
        for step in range(3):
            engine.backward(engine(inputs(step)))
            engine.step()
            streams.waits()
            with refusing_host_waits():
                norms.append(engine.grad_norm_tensor())
            assert streams.waits() == []
            assert norms[-1].item() == pytest.approx(engine.get_global_grad_norm())
    assert len({norm.item() for norm in norms}) == 3
    engine.destroy()


READS: dict[str, Any] = {
    "item": lambda t: t.sum().item(),
    "float": lambda t: float(t.sum()),
    "if": lambda t: 1 if t.sum() > 0 else 0,
    "tolist": lambda t: t.tolist(),
    "cpu": lambda t: t.cpu(),
    "equal": lambda t: torch.equal(t, t),
    "nonzero": lambda t: t.nonzero(),
    "mask": lambda t: t[t > 0],
    "tensor": lambda t: torch.tensor([1.0], dtype=torch.float32, device=t.device),
    "from the host": lambda t: t.copy_(torch.zeros(3, dtype=torch.float32, device=HOST)),
    "to the host": lambda t: torch.zeros(3, dtype=torch.float32, device=HOST).copy_(t),
    "both": lambda t: t + torch.zeros(3, dtype=torch.float32, device=HOST),
}


@pytest.mark.parametrize("read", READS)
def test_what_the_check_refuses(read):
    device = torch.ones(3, dtype=torch.float32)
    weight = device.clone().requires_grad_()
    weight.register_hook(lambda grad: READS[read](grad.detach()) and None)
    with refusing_host_waits():
        with pytest.raises(HostWaitError):
            READS[read](device)
        with pytest.raises(HostWaitError):  # in a hook of a backward, too
            weight.sum().backward()


def test_what_the_check_lets_pass():
    device = torch.ones(3, dtype=torch.float32)
    with refusing_host_waits():
        copied = LateStreams().copy_to_host(device)
        assert copied.wait().tolist() == [1.0] * 3 and bool(copied.wait().sum() == 3)
        assert torch.zeros((), dtype=torch.float64, device=HOST).item() == 0
        device += torch.ones((), dtype=torch.float32, device=HOST)
        device.fill_(2.0)
