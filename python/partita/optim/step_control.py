"""The memory in which a step decides: gradient norm, loss scale, skip flag, clip factor, step number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partita import _core
from partita.device import kernels
from partita.device.memory import HOST
from partita.device.streams import HostCopy, Streams

LOSS_SCALE_FIELDS = (
    "scale",
    "applied_steps",
    "skipped_steps",
    "good_steps",
    "hysteresis",
    "consecutive_skips",
    "at_minimum",
)
TOTALS = 3
CONTROL_FIELDS = ("grad_norm", "grad_scale", "skip", "step")


@dataclass(frozen=True)
class StepOutcome:
    """What became of a step."""

    control: _core.StepControl
    loss_scale: _core.LossScaleState
    digests_agree: bool  # whether all ranks took the step with the same hyper-parameters, see `StepController.totals`


class PendingOutcome:
    """The outcome of a step, on its way to the host."""

    def __init__(self, memory: HostCopy, world_size: int) -> None:
        self._memory = memory
        self._world_size = world_size

    def wait(self) -> StepOutcome:
        """The outcome, once the step is done."""
        memory = self._memory.wait()
        state = memory[_core.StepControl.nbytes :]
        total, squares = (int(v) for v in _totals_in(memory)[1:].tolist())
        return StepOutcome(
            _core.StepControl.read(memory.data_ptr()),
            _core.LossScaleState.read(state.data_ptr()),
            digests_agree=self._world_size * squares == total * total,  # Cauchy and Schwarz: equal only if all are
        )


class StepController:
    """Owns the loss scale and the control block that the update reads.

    Everything lives in tensors, so that on a GPU deciding needs no host; the properties wait for the GPU.

    Args:
        world_size: number of ranks that decide together.

    Attributes:
        totals: three float64, which one all-reduce sums over all ranks: the sum of squares of the gradients, a digest
            of what the ranks take the step with, and its square. So ranks find out that they differ without a
            collective or a wait of their own: the outcome brings it to the host.
    """

    def __init__(self, scaler: _core.LossScaler, streams: Streams, world_size: int = 1) -> None:
        self.scaler = scaler
        memory = torch.zeros(
            _core.StepControl.nbytes + _core.LossScaleState.nbytes + TOTALS * torch.float64.itemsize,
            dtype=torch.uint8,
            device=HOST,
        )
        scaler.initial().write(memory[_core.StepControl.nbytes :].data_ptr())
        self._memory = memory.to(streams.device)  # together, so that one copy brings both to the host
        self.control: Tensor = self._memory[: _core.StepControl.nbytes]
        self._state: Tensor = self._memory[_core.StepControl.nbytes :][: _core.LossScaleState.nbytes]
        self.totals = _totals_in(self._memory)
        self._begin = torch.zeros(TOTALS, dtype=torch.float64, device=streams.device)
        self._digest = 0
        self._streams = streams
        self._world_size = world_size

    def begin(self, digest: int) -> None:
        """A step begins: `totals` are this rank's, without the gradients' share.

        Args:
            digest: of what all ranks must take the step with; below 2^20.
        """
        if digest != self._digest:  # written by kernels: a copy from the host might wait
            self._digest = digest
            self._begin[1].fill_(digest)
            self._begin[2].fill_(digest * digest)
        self.totals.copy_(self._begin)

    def decide(self, *, mean: float, clip: float) -> None:
        """Fills the control block from the sum of squares (see `loss_scale_update` in loss_scale.h)."""
        kernels.loss_scale_update(self.control, self._state, self.scaler, self.totals[:1], mean=mean, clip=clip)

    def state_dict(self) -> dict[str, Any]:
        """The loss scale with its counters, and what the last step was like."""
        outcome = self.outcome().wait()
        return {
            "loss_scale": {name: getattr(outcome.loss_scale, name) for name in LOSS_SCALE_FIELDS},
            "last_step": {name: getattr(outcome.control, name) for name in CONTROL_FIELDS},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of `state_dict`."""
        memory = torch.zeros_like(self._memory, device=HOST)
        _core.StepControl(**state["last_step"]).write(memory.data_ptr())
        _core.LossScaleState(**state["loss_scale"]).write(memory[_core.StepControl.nbytes :].data_ptr())
        self._memory.copy_(memory)

    def outcome(self) -> PendingOutcome:
        """What the last decision was; the host gets it without holding up the device."""
        return PendingOutcome(self._streams.copy_to_host(self._memory), self._world_size)

    def control_on_host(self) -> Tensor:
        """The control block, for updates on the host, which waits for it."""
        return self._streams.copy_to_host(self._memory).wait()[: _core.StepControl.nbytes]

    @property
    def scale(self) -> Tensor:
        """The loss scale in memory: one float64, which a step may change."""
        return self._state[: torch.float64.itemsize].view(torch.float64)

    @property
    def last(self) -> _core.StepControl:
        """The control block of the last step."""
        return self.outcome().wait().control

    @property
    def loss_scale(self) -> _core.LossScaleState:
        """The loss scale and the counters that it depends on."""
        return self.outcome().wait().loss_scale


def _totals_in(memory: Tensor) -> Tensor:
    """The totals at the end of the memory of a `StepController`."""
    return memory[-TOTALS * torch.float64.itemsize :].view(torch.float64)
