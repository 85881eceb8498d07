"""A module in training: from a forward to reduced gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from partita.model.access import GivenAccess, ParameterAccess
from partita.model.accumulation import Accumulation
from partita.model.backward import Backward
from partita.model.buffers import SharedBuffers
from partita.model.changes import ModelGuard
from partita.model.forward_flops import BACKWARD, ForwardFlops
from partita.model.loss_scaling import LossScaling
from partita.model.recompute import ActivationCheckpoints
from partita.model.take import take_model
from partita.model.writes import UncountedWrites
from partita.run import Run
from partita.units import GradientReducer, ParameterGathers

_NO_AUTOCAST = nullcontext()
NO_REPLICAS: Mapping[str, str] = MappingProxyType({})


class ModelPart:
    """One module's units, the lifetimes of its parameters, the reduction of its gradients, and what watches over it.

    An engine has one part. A rank of a pipeline has one for each of its chunks; `OptimizerStep` updates all of them
    together.

    Args:
        module: on the device to train on; its parameters become views into flat buffers.
        optimizer: over what is trained, and possibly over parameters of other parts; None: nothing is trained.
        scaling: shared by all parts of a model.
        accumulation: says which backwards of this part reduce.
        gathers: brings the parameters that other ranks updated; shared by all parts.
        exits: lets go of the module.
        replicas: parameters that another part has, too, and counts and saves: name here -> name there.

    Raises:
        ValueError, TypeError: the module cannot be trained as asked; names the parameter or module.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer | None,
        run: Run,
        scaling: LossScaling,
        accumulation: Accumulation,
        gathers: ParameterGathers,
        exits: ExitStack,
        replicas: Mapping[str, str] = NO_REPLICAS,
    ) -> None:
        self.module = module
        self.replicas = dict(replicas)
        self.gathers = gathers
        self.accumulation = accumulation
        self._run = run
        self._flops = ForwardFlops(run.config.counts_flops)
        checkpointing = run.config.activation_checkpointing
        if checkpointing.enabled:
            on_host = checkpointing.cpu_checkpointing
            exits.callback(ActivationCheckpoints(module, checkpointing.classes, on_host=on_host).close)
        taken = take_model(module, optimizer, run, exits)
        self.units, self.frozen = taken.units.trained, taken.units.frozen
        self.untrained = taken.untrained
        if replicas:
            for unit in self.units:
                unit.leave_out_of_norm(replicas.keys())
        self._writes = UncountedWrites(self.units, run.streams)
        self._buffers = SharedBuffers(module, run.grid.data, run.streams)
        self._guard = ModelGuard(module, self.units, self.untrained)
        if run.config.zero_optimization.overlap_gather:
            gathers.wait_in_forward(module, self.units)
        self._backward = Backward(taken.units, run, taken.gathering, scaling, accumulation, exits)
        self.access = ParameterAccess(self.units, self.reducer, gathers, self._backward.lifetimes, run, scaling)
        exits.callback(GivenAccess(self.access, [p for unit in self.units for p in unit.parameters]).close)

    @property
    def reducer(self) -> GradientReducer:
        """What reduces the gradients of this part."""
        return self._backward.reducer

    @property
    def flops(self) -> float:
        """Floating-point operations of a forward and its backward, without what is computed twice; 0: not known."""
        return (1 + BACKWARD) * (self._flops.count or 0)

    @property
    def ended_backwards(self) -> int:
        """Backwards of this part so far."""
        return self._backward.ended_count

    def require_no_gradients(self, when: str) -> None:
        """Raises RuntimeError if there are gradients of a step that has not been taken. `when` is for the error."""
        self.heed()
        if self.reducer.has_gradients:
            raise RuntimeError(
                f"the model has gradients of an unfinished step when {when}: do that after the engine.step() that "
                "updates, or drop them with engine.zero_grad()"
            )

    # -- a micro-batch

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module. With gradients enabled a backward may follow."""
        with self._autocast():
            try:
                outputs = self._flops.run(self.module, *args, **kwargs)
            except BaseException:
                self._backward.lifetimes.release_all()
                raise
        if torch.is_grad_enabled():
            self._backward.watch(outputs)
        return outputs

    def backward(
        self, roots: Sequence[Tensor], grads: Sequence[Tensor] | None = None, *, retain_graph: bool = False
    ) -> None:
        """Runs a backward and adds the gradients of this part's parameters to those of the step.

        Args:
            roots: a scaled loss, or outputs of `forward()`.
            grads: the gradients of these outputs, which carry the loss scale; None for a loss.
        """
        self._backward.run(roots, grads, retain_graph)

    def heed(self) -> bool:
        """Gradients that the program has dropped are gone. Returns whether nothing is left of this micro-batch.

        Raises:
            RuntimeError: they cannot be told from those of earlier micro-batches any more; names a parameter.
        """
        reducer = self._backward.reducer
        is_broken = reducer.in_backward
        is_empty = reducer.heed()
        if is_empty and is_broken:
            self.rest()
        return is_empty

    def finish_backward(self) -> None:
        """The backward under way is over, if there is one, and gradients that the program has written count."""
        self._backward.finish()
        self.take_written()

    def take_written(self) -> None:
        """Gradients that the program has written into `parameter.grad` count, as those of a backward."""
        self.reducer.take_written()

    def reduce(self) -> None:
        """Begins to reduce what the backwards of this step have left on this rank."""
        self.reducer.reduce_local()

    def forget(self) -> None:
        """The micro-batch is over."""
        self._backward.forget()

    def commit(self) -> None:
        """The gradients of this micro-batch count, whatever the program drops from now on."""
        self.reducer.commit()

    # -- a step

    def before_update(self) -> None:
        """Makes the part ready for an update: gradients are reduced, and what a program did meanwhile is taken in.

        Raises:
            RuntimeError: the update would not reach the parameters that the module uses; names one.
        """
        self._backward.lifetimes.release_all()
        self._guard.check()
        self.gathers.wait()  # of parameters that no forward has used since
        for flat in (*self.units, *self.frozen):
            flat.check_unwritten()
        self._writes.adopt()
        self.reducer.reduce_all()
        for unit in self.units:  # what was frozen after its backward stands still, too
            for slot in unit.frozen_slots():
                unit.drop_gradient(slot)

    def share_buffers(self) -> None:
        """All ranks have rank 0's buffers, unless the config leaves each rank its own. A collective."""
        if self._run.config.sync_buffers:
            self._buffers.share_all()

    def share_buffers_after_update(self) -> None:
        """The same for those that differ, after an update."""
        if self._run.config.sync_buffers:
            self._buffers.after_update()

    def adopt_written_parameters(self, *, looks: bool = True) -> None:
        """The masters have what a program wrote into 16-bit parameters.

        Args:
            looks: also where nothing counted the writes: all parameters are compared, and the host waits.
        """
        for unit in self.units:
            unit.adopt_written_parameters(looks=looks)

    def rest(self) -> None:
        """Nothing computes, and no parameter is gathered: what a forward without a backward left is released."""
        self._backward.forget()
        self._backward.lifetimes.release_all()

    def drop_gradients(self) -> None:
        """Forgets the gradients since the last update, also those of an unfinished backward."""
        self.reducer.reset()

    def give_up(self) -> None:
        """As `drop_gradients`, and nothing computes any more: after an error, say."""
        self.drop_gradients()
        self.rest()

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = self._run.precision.autocast
        return _NO_AUTOCAST if dtype is None else torch.autocast(self._run.device.type, dtype)
