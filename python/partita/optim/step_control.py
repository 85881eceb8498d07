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
CONTROL_FIELDS = ("grad_norm", "grad_scale", "skip", "step")


@dataclass(frozen=True)
class StepOutcome:
    """What became of a step."""

    control: _core.StepControl
    loss_scale: _core.LossScaleState


class PendingOutcome:
    """The outcome of a step, on its way to the host."""

    def __init__(self, memory: HostCopy) -> None:
        self._memory = memory

    def wait(self) -> StepOutcome:
        """The outcome, once the step is done."""
        memory = self._memory.wait()
        state = memory[_core.StepControl.nbytes :]
        return StepOutcome(
            _core.StepControl.read(kernels.address(memory)), _core.LossScaleState.read(kernels.address(state))
        )


class StepController:
    """Owns the loss scale and the control block that the update reads.

    Everything lives in tensors, so that on a GPU deciding needs no host; the properties wait for the GPU.
    """

    def __init__(self, scaler: _core.LossScaler, streams: Streams) -> None:
        self.scaler = scaler
        self.sum_of_squares = torch.zeros(1, dtype=torch.float64, device=streams.device)
        memory = torch.zeros(_core.StepControl.nbytes + _core.LossScaleState.nbytes, dtype=torch.uint8, device=HOST)
        scaler.initial().write(kernels.address(memory[_core.StepControl.nbytes :]))
        self._memory = memory.to(streams.device)  # together, so that one copy brings both to the host
        self.control: Tensor = self._memory[: _core.StepControl.nbytes]
        self._state: Tensor = self._memory[_core.StepControl.nbytes :]
        self._streams = streams

    def decide(self, *, mean: float, clip: float) -> None:
        """Fills the control block from `sum_of_squares` (see `loss_scale_update` in loss_scale.h)."""
        kernels.loss_scale_update(self.control, self._state, self.scaler, self.sum_of_squares, mean=mean, clip=clip)

    def state_dict(self) -> dict[str, Any]:
        """The loss scale with its counters, and what the last step was like."""
        outcome = self.outcome().wait()
        return {
            "loss_scale": {name: getattr(outcome.loss_scale, name) for name in LOSS_SCALE_FIELDS},
            "last_step": {name: getattr(outcome.control, name) for name in CONTROL_FIELDS},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of `state_dict`."""
        memory = torch.empty_like(self._memory, device=HOST)
        _core.StepControl(**state["last_step"]).write(kernels.address(memory))
        _core.LossScaleState(**state["loss_scale"]).write(kernels.address(memory[_core.StepControl.nbytes :]))
        self._memory.copy_(memory)

    def outcome(self) -> PendingOutcome:
        """What the last decision was; the host gets it without holding up the device."""
        return PendingOutcome(self._streams.copy_to_host(self._memory))

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
