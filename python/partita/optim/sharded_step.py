"""From reduced gradients to new weights, whatever the stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim import Optimizer

from partita.device import HOST, kernels
from partita.optim.fused_adam import is_native
from partita.optim.groups import StepDigest
from partita.optim.step_control import StepController
from partita.optim.step_hooks import StepCall, StepHooks
from partita.optim.torch_update import TorchUpdate
from partita.optim.updates import NativeAdam, ShardUpdate
from partita.optim.waiting import frozen_slots
from partita.run import Run
from partita.units import ParameterGathers, Unit


class ShardedStep:
    """Updates this rank's own range of every unit and gathers the new parameters.

    Args:
        inner: the user's optimizer.
        outer: the one that programs get.
        units: of all models that this optimizer trains, in launch order.
        run: of its grid, the norm is that of the world's gradients, and new parameters are gathered from the
            data-parallel ranks.
        gathers: takes the all-gathers that are under way when `run()` returns.
    """

    def __init__(
        self,
        inner: Optimizer,
        outer: Optimizer,
        units: Sequence[Unit],
        run: Run,
        controller: StepController,
        gathers: ParameterGathers,
    ) -> None:
        self._digest = StepDigest(inner)
        self._units = list(units)
        self._grid = run.grid
        self._policy = run.policy
        self._controller = controller
        self._gathers = gathers
        self._hooks = StepHooks([inner, outer])
        self._call: StepCall | None = None  # of the step under way, if hooks follow it
        self._host_threads = run.host_threads
        kind = NativeAdam if is_native(inner) else TorchUpdate
        self.update: ShardUpdate = kind(inner, self._units, controller, run.host_threads)
        self._norm_parts, self._host_norm_parts = (
            [kernels.norm_part(unit.reduced, unit.norm_segments) for unit in self._units if unit.offloads == on_host]
            for on_host in (False, True)
        )

    def run(self, *, mean: float, clip: float, micro_batches: int) -> None:
        """One step from `Unit.reduced` of all units; the control block tells afterwards what was decided.

        The new parameters of other ranks are there when their gathers have been waited for.

        Args:
            mean: what a stored gradient is multiplied by to be the mean over micro-batches and ranks.
            clip: the largest norm of the mean gradient; 0: no clipping.
            micro_batches: of this rank since the last step. Ranks that differ there, in hyper-parameters or in what is
                frozen learn that from the outcome.
        """
        frozen: list[str] = []
        if self._grid.shape.pipe == 1:  # ranks of a pipeline have other parameters each
            frozen = [s.name for slots in frozen_slots(self._units) for s in sorted(slots, key=lambda s: s.offset)]
        total = self._controller.begin(self._digest.take(micro_batches, frozen))
        kernels.sum_of_squares(total, self._norm_parts)
        if self._host_norm_parts:
            on_host = torch.zeros(1, dtype=torch.float64, device=HOST)
            kernels.sum_of_squares(on_host, self._host_norm_parts, threads=self._host_threads)
            total += on_host.item()  # as an argument of the kernel: no copy, for which the host would wait
        self._grid.world.all_reduce(self._controller.sums).wait()
        take_back = self._controller.remember() if self._hooks.precede else None
        self._controller.decide(mean=mean, clip=clip)
        try:
            self._begin()
        except BaseException:
            if take_back is not None:  # a hook of the program has raised: no step was taken, and none is counted
                take_back()
            raise
        gathered = self._policy.shards_states and self._grid.data.world_size > 1
        here = [i for i, unit in enumerate(self._units) if gathered and unit.residence.all_gathers_updates]
        self.update.update(i for i in range(len(self._units)) if i not in here)
        # Forward needs the last units first; the gathering of each goes on beside the update of the next.
        for i in reversed(here):
            self.update.update([i])
            self._gathers.add(self._units[i], self._grid.data.all_gather(self._units[i].params))
        if any(unit.residence.is_read_by_peers for unit in self._units):
            self._grid.data.barrier()  # then every rank may read what the others have written

    def _begin(self) -> None:
        """Hooks run as in torch, so not in a step that is skipped: with hooks, the host waits for the decision."""
        call = StepCall()
        hooks_run = (self._hooks.precede or self._hooks.follow) and not self._controller.last.skip
        if hooks_run:
            call = self._hooks.before()
        self._call = call if hooks_run and self._hooks.follow else None
        self.update.begin(call)

    @property
    def is_followed(self) -> bool:
        """Whether hooks follow the step, and may read the parameters."""
        return self._call is not None

    def finish(self) -> None:
        """All parameters are there: the hooks that follow the step run."""
        call, self._call = self._call, None
        if call is not None:
            self._hooks.after(call)

    def close(self) -> None:
        """The user's optimizer is as it was before, without states."""
        self.update.close()
