"""The memory in which a step decides: gradient norm, loss scale, skip flag, clip factor, step number; and its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from partita import _core
from partita.comm import WaitsLedger
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
STEP_FIELDS = ("applied_steps", "skipped_steps")  # of these
SUMS_BEGIN = _core.StepControl.nbytes + _core.LossScaleState.nbytes  # a multiple of 8
SUMS = 9
CONTROL_FIELDS = ("grad_norm", "grad_scale", "skip", "step")


@dataclass(frozen=True)
class Wishes:
    """What a rank wants all ranks to do after a step: save a checkpoint; save one and end the run."""

    save: bool = False
    end: bool = False


@dataclass(frozen=True)
class StepOutcome:
    """What became of a step."""

    control: _core.StepControl
    loss_scale: _core.LossScaleState
    loss: float | None  # mean over the micro-batches and ranks that told theirs; None: nobody did
    digests_agree: bool  # whether all ranks took the step with the same hyper-parameters, see `StepController.sums`
    wishes: Wishes  # of all ranks together
    waits: tuple[float, ...]  # the sum of what ranks lost to waiting, see `WaitsLedger.take`; may be empty
    tokens: int  # of all ranks, as far as they have told theirs
    flops: float  # of the model on all ranks, as far as they have told theirs


class PendingOutcome:
    """The outcome of a step, on its way to the host.

    Several may be unread. Each has host memory of its own, which goes when the outcome is read or nobody has it any
    more: torch's allocator of pinned memory hands it out again once the copy into it is done. So a run takes new pinned
    memory in its first steps, and none later.
    """

    def __init__(self, memory: HostCopy, world_size: int, has_arrived: Callable[[], bool]) -> None:
        self._memory: HostCopy | None = memory
        self._world_size = world_size
        self._has_arrived = has_arrived
        self._known: StepOutcome | None = None

    @property
    def has_arrived(self) -> bool:
        """Whether `wait()` returns at once. Nobody waits."""
        return self._memory is None or self._has_arrived()

    def wait(self) -> StepOutcome:
        """The outcome, once the step is decided. Several ask, and the memory is read once."""
        if self._memory is not None:
            self._known = self._read(self._memory.wait())
            self._memory = None
        assert self._known is not None
        return self._known

    def _read(self, memory: Tensor) -> StepOutcome:
        sums = memory[SUMS_BEGIN:].view(torch.float64).tolist()
        _, loss, count, total, squares, save, end, tokens, flops = sums[:SUMS]
        control = kernels.address(memory)
        return StepOutcome(
            _core.StepControl.read(control),
            _core.LossScaleState.read(control + _core.StepControl.nbytes),
            loss / count if count else None,
            digests_agree=self._world_size * int(squares) == int(total) ** 2,  # Cauchy, Schwarz: if all are
            wishes=Wishes(save=bool(save), end=bool(end)),
            waits=tuple(sums[SUMS:]),
            tokens=int(tokens),
            flops=flops,
        )


class StepController:
    """Owns the loss scale and the control block that the update reads.

    Everything lives in tensors, so that on a GPU deciding needs no host; the properties wait for the GPU.

    Args:
        world_size: number of ranks that decide together.
        ledger: what this rank loses to waiting in each step; None: it is not told.

    Attributes:
        sums: over the ranks, added up by one all-reduce: the squares of the gradients, the losses, their number, a
            digest of what the ranks take the step with, its square, the wishes of ranks, their tokens and operations,
            and what they lost to waiting.
            So ranks find out that they differ, and what one of them wants, without a collective or a wait of their own:
            the outcome brings it to the host.
        sum_of_squares: the first of them.
        wishes: asked for this rank's in every step.
    """

    def __init__(
        self, scaler: _core.LossScaler, streams: Streams, world_size: int = 1, ledger: WaitsLedger | None = None
    ) -> None:
        self.scaler = scaler
        self.ledger = ledger
        count = SUMS + (0 if ledger is None else ledger.slots)
        memory = torch.zeros(SUMS_BEGIN + count * torch.float64.itemsize, dtype=torch.uint8, device=HOST)
        scaler.initial().write(kernels.address(memory[_core.StepControl.nbytes :]))
        self._memory = memory.to(streams.device)  # together, so that one copy brings both to the host
        self.control: Tensor = self._memory[: _core.StepControl.nbytes]
        self._state: Tensor = self._memory[_core.StepControl.nbytes : SUMS_BEGIN]
        self.sums: Tensor = self._memory[SUMS_BEGIN:].view(torch.float64)
        self.sum_of_squares: Tensor = self.sums[:1]
        # What this rank adds to `sums`. The host knows what is there: losses told since the last step, and the digest.
        self._own = torch.zeros(count, dtype=torch.float64, device=streams.device)
        self._loss, self._own_count, *digest, self._own_save, self._own_end = self._own[1 : SUMS - 2].unbind()
        self._own_work = self._own[SUMS - 2 : SUMS].unbind()
        self._own_waits = self._own[SUMS:]
        self._own_digest = digest
        self._losses = self._count = self._digest = 0
        self._wished = Wishes()
        self._work: tuple[float, float] = (0, 0)  # tokens and operations since the last step
        self._told_work: tuple[float, float] = (0, 0)  # as `_own` has them
        self.wishes: Callable[[], Wishes] = Wishes
        self._streams = streams
        self._world_size = world_size
        self._outcome: PendingOutcome | None = None  # of what `_memory` has been decided to be

    def add_loss(self, loss: Tensor) -> None:
        """A micro-batch's loss, a scalar, for the report of the step. Nobody waits for it."""
        if loss.device != self._loss.device:
            return
        loss = loss.detach()
        if loss.dim():
            loss = loss.reshape(())
        if self._losses:
            self._loss.add_(loss)
        else:
            self._loss.copy_(loss)  # what is there is of the last step
        self._losses += 1

    def mean_loss(self) -> Tensor:
        """The mean of the losses that ranks have told in the step before this one, float32, on the device; NaN if
        nobody has. It is there once the step was decided."""
        return (self.sums[1] / self.sums[2]).float()

    def grad_norm(self) -> Tensor:
        """The norm of the last step's mean gradient before clipping, float32, on the device; it is there once the step
        was decided."""
        return self.control[: torch.float64.itemsize].view(torch.float64).float().reshape(())  # the first of its fields

    def add_work(self, tokens: int, flops: float) -> None:
        """What a micro-batch has on this rank; 0: not known."""
        self._work = (self._work[0] + tokens, self._work[1] + flops)

    def forget_told(self) -> None:
        """The next step begins: losses and work are those of micro-batches to come."""
        self._losses = 0
        self._work = (0, 0)

    def begin(self, digest: int) -> Tensor:
        """`sum_of_squares` is zero, and the other `sums` are this rank's.

        Args:
            digest: of what all ranks must take the step with; below 2^20.
        """
        if self._losses != self._count:  # written by kernels: a copy from the host might wait
            self._count = self._losses
            self._own_count.fill_(self._losses)
        if not self._losses:
            self._loss.zero_()
        if digest != self._digest:
            self._digest = digest
            for place, value in zip(self._own_digest, (digest, digest * digest), strict=True):
                place.fill_(value)
        if (wished := self.wishes()) != self._wished:
            self._wished = wished
            self._own_save.fill_(float(wished.save))
            self._own_end.fill_(float(wished.end))
        if self._work != self._told_work:
            self._told_work = self._work
            for place, told in zip(self._own_work, self._work, strict=True):
                place.fill_(told)
        if self.ledger is not None and self.ledger.slots:  # then all is in memory of the host
            self._own_waits.copy_(torch.tensor(self.ledger.take(), dtype=torch.float64, device=HOST))
        self.sums.copy_(self._own)
        return self.sum_of_squares

    def remember(self) -> Callable[[], object]:
        """Returns what takes back the decisions since."""
        before, outcome = self._memory.clone(), self._outcome

        def take_back() -> None:
            self._memory.copy_(before)
            self._outcome = outcome

        return take_back

    def decide(self, *, mean: float, clip: float) -> None:
        """Fills the control block from the sum of squares (see `loss_scale_update` in loss_scale.h), and starts the
        copy of the outcome: whoever waits for it does not wait for the update, which is queued after it."""
        kernels.loss_scale_update(self.control, self._state, self.scaler, self.sum_of_squares, mean=mean, clip=clip)
        self._outcome = self._copy()

    def state_dict(self) -> dict[str, Any]:
        """The loss scale with its counters, and what the last step was like."""
        outcome = self.outcome().wait()
        return {
            "loss_scale": {name: getattr(outcome.loss_scale, name) for name in LOSS_SCALE_FIELDS},
            "scales": self.scaler.dynamic,
            "last_step": {name: getattr(outcome.control, name) for name in CONTROL_FIELDS},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of `state_dict`. A scale that is not the outcome of the same rules there and here stays as it
        begins here, and only the steps are counted on."""
        saved = dict(state["loss_scale"])
        if not (self.scaler.dynamic and state["scales"]):
            initial = self.scaler.initial()
            saved |= {name: getattr(initial, name) for name in LOSS_SCALE_FIELDS if name not in STEP_FIELDS}
        memory = torch.zeros_like(self._memory, device=HOST)
        _core.StepControl(**state["last_step"]).write(kernels.address(memory))
        _core.LossScaleState(**saved).write(kernels.address(memory[_core.StepControl.nbytes :]))
        self._memory.copy_(memory)
        self._outcome = None

    def outcome(self) -> PendingOutcome:
        """What the last decision was. One copy serves all who ask."""
        if self._outcome is None:  # nothing was decided since the beginning, or since a load
            self._outcome = self._copy()
        return self._outcome

    def control_on_host(self) -> Tensor:
        """The control block, for updates on the host, which waits for it."""
        control = torch.empty(_core.StepControl.nbytes, dtype=torch.uint8, device=HOST)
        self.last.write(kernels.address(control))
        return control

    def _copy(self) -> PendingOutcome:
        copy = self._streams.copy_to_host(self._memory)
        return PendingOutcome(copy, self._world_size, partial(self._streams.is_reached, self._streams.mark()))

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
