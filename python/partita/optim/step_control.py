"""The memory in which a step decides: gradient norm, loss scale, skip flag, clip factor, step number."""

from __future__ import annotations

import torch

from partita import _core


class StepController:
    """Owns the loss scale and the control block that the update reads.

    Everything lives in tensors, so that on a device deciding needs no host; the properties copy them to the host.
    """

    def __init__(self, scaler: _core.LossScaler) -> None:
        self.sum_of_squares = torch.zeros(1, dtype=torch.float64)
        self.control = torch.zeros(_core.StepControl.nbytes, dtype=torch.uint8)
        self._state = torch.zeros(_core.LossScaleState.nbytes, dtype=torch.uint8)
        self._scaler = scaler
        scaler.initial().write(self._state.data_ptr())

    def decide(self, *, mean: float, clip: float) -> None:
        """Fills the control block from `sum_of_squares` (see `loss_scale_update` in loss_scale.h)."""
        _core.loss_scale_update(
            self.control.data_ptr(),
            self._state.data_ptr(),
            self._scaler,
            self.sum_of_squares.data_ptr(),
            mean,
            clip,
        )

    @property
    def last(self) -> _core.StepControl:
        """The control block of the last step."""
        return _core.StepControl.read(self.control.data_ptr())

    @property
    def loss_scale(self) -> _core.LossScaleState:
        """The loss scale and the counters that it depends on."""
        return _core.LossScaleState.read(self._state.data_ptr())
