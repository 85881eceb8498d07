"""The one place that looks into an engine, and that replaces what an engine is made of.

Tests, benchmarks and examples ask here for what an engine does not say to programs; `test_architecture.py` holds that.
When the engine is rebuilt, only this file changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import partita.comm.torch_transport
import partita.run.run
import partita.units.residence.gathered
import partita.units.unit
from partita import Engine
from partita._core import LossScaleState, StepControl
from partita.comm import Communicator
from partita.device import kernels
from partita.device.memory import host_buffer
from partita.device.streams import Streams
from partita.optim import ShardedStep
from partita.units import ParameterLifetimes, Unit
from partita.units.build import ParameterGroup
from partita.units.parameters import FlatParameters
from partita.units.reducer import GradientReducer
from torch import Tensor

# The module that takes communicators and streams by name.
_MODULE: Any = partita.run.run

# Called as `world_communicator` is.
Connect = Callable[..., Communicator]
# Called when the gradients of a unit begin to be packed; the result is called right before the kernel that packs them.
PackWatch = Callable[[Unit], Callable[[], None]]

# -- what an engine has


def units(engine: Engine) -> list[Unit]:
    """The units that are trained, in the order of the model."""
    return engine._part.units


def frozen_units(engine: Engine) -> list[FlatParameters]:
    """The units that are partitioned and not trained."""
    return engine._part.frozen


def blocks(engine: Engine) -> list[ParameterGroup]:
    """The blocks of stage 3, each with its module and units."""
    return _lifetimes(engine).groups[:-1]


def root(engine: Engine) -> ParameterGroup:
    """What stage 3 gathers beside the blocks."""
    return _lifetimes(engine).groups[-1]


def gathered_bytes(engine: Engine) -> int:
    """Memory of full parameters that this rank does not keep."""
    return _lifetimes(engine).gathered_bytes


def communicator(engine: Engine) -> Communicator:
    """The communicator of all ranks."""
    return engine._run.grid.world


def streams(engine: Engine) -> Streams:
    """The streams that the engine works on."""
    return engine._run.streams


def predivide(engine: Engine) -> float:
    """What gradients are divided by before they are summed over ranks."""
    return engine._run.predivide


def _lifetimes(engine: Engine) -> ParameterLifetimes:
    return engine._part._backward.lifetimes


# -- what a step has


def moments(engine: Engine) -> list[dict[str, Tensor]]:
    """For each unit the native moments by name, flat, of the unit's own range; empty under other optimizers."""
    names = ("exp_avg", "exp_avg_sq") if update_kind(engine) == "NativeAdam" else ()
    return [{name: unit.states[name] for name in names} for unit in units(engine)]


def torch_states(engine: Engine) -> list[dict[str, Any]]:
    """The states that an optimizer of torch keeps, one entry per piece of a parameter."""
    assert engine.optimizer is not None
    return list(engine.optimizer.inner.state.values())


def state_numel(engine: Engine, name: str) -> int:
    """Elements of an optimizer state that this rank has, without padding."""
    return sum(part.numel for unit in units(engine) if name in unit.states for part in unit.own_slices())


def update_kind(engine: Engine) -> str:
    """How new weights are computed: "NativeAdam" or "TorchUpdate"."""
    return type(_sharded(engine).update).__name__


def last_control(engine: Engine) -> StepControl:
    """What was decided in the last step."""
    return engine._step.controller.last


def loss_scale(engine: Engine) -> LossScaleState:
    """The loss scale and the counters beside it."""
    return engine._step.controller.loss_scale


def learning_rates(engine: Engine) -> list[float]:
    """The learning rates as they are now: `engine.get_lr()` waits for the outcome of the last step first."""
    return engine._step.learning_rates()


def _sharded(engine: Engine) -> ShardedStep:
    assert engine._step.sharded is not None, "the engine has no optimizer"
    return engine._step.sharded


# -- what an engine is made of


def connect() -> Connect:
    """How an engine that is made now gets its communicators."""
    made: Connect = _MODULE.world_communicator
    return made


def with_connect(replacement: Connect) -> AbstractContextManager[Any]:
    """Engines made in this block get their communicators from `replacement`."""
    return mock.patch.object(_MODULE, "world_communicator", replacement)


def connect_by(replacement: Connect) -> None:
    """Engines of this process get their communicators from `replacement`, to the end of the process."""
    _MODULE.world_communicator = replacement


def with_streams(replacement: Streams) -> AbstractContextManager[Any]:
    """Engines made in this block work on `replacement`."""
    return mock.patch.object(_MODULE, "streams_of", lambda _device: replacement)


def whole_collectives() -> AbstractContextManager[Any]:
    """Communicators over torch.distributed made in this block do over any backend what they do over NCCL: whole
    collectives of the backend, whose waits look at what is outstanding."""
    return mock.patch.object(partita.comm.torch_transport, "FASTER_BY_MESSAGES", frozenset())


def save_in_files_of(engine: Engine, folder: Path, max_bytes: int) -> None:
    """`save_model()` with smaller files than five gigabytes."""
    from partita.checkpoint import ModelWeights, save_model_files

    state = engine.train_state()
    save_model_files(ModelWeights(state, None), folder, state.world, max_bytes)


# -- what an engine does


def watching_step(engine: Engine, note: Callable[[], None]) -> AbstractContextManager[Any]:
    """In this block `note()` is called when a step begins to compute: all gradients are reduced, no norm is known."""
    sharded = _sharded(engine)
    return _calling_first(sharded, "run", note)


def watching_update(engine: Engine, note: Callable[[], None]) -> AbstractContextManager[Any]:
    """In this block `note()` is called when a step is decided, right before hyper-parameters are read."""
    return _calling_first(_sharded(engine).update, "begin", note)


def _calling_first(owner: Any, method: str, note: Callable[[], None]) -> AbstractContextManager[Any]:
    original = getattr(owner, method)

    def noted(*args: Any, **kwargs: Any) -> Any:
        note()
        return original(*args, **kwargs)

    return mock.patch.object(owner, method, noted)


@contextmanager
def watching_packs(watch: PackWatch) -> Iterator[None]:
    """Every unit whose gradients are packed in this block is shown to `watch`."""
    original, pack = GradientReducer._pack, kernels.pack

    def watched(self: Any, index: int, buffer: Tensor, *, accumulate: bool) -> None:
        note = watch(self.units[index])

        def note_and_pack(*args: Any, **kwargs: Any) -> None:
            note()
            pack(*args, **kwargs)

        with mock.patch.object(kernels, "pack", note_and_pack):
            original(self, index, buffer, accumulate=accumulate)

    with mock.patch.object(GradientReducer, "_pack", watched):
        yield


@contextmanager
def noting_host_buffers() -> Iterator[list[Tensor]]:
    """The buffers on the host that units made in this block have."""
    made: list[Tensor] = []

    def note(*args: Any) -> Tensor:
        made.append(host_buffer(*args))
        return made[-1]

    with (
        mock.patch.object(partita.units.unit, "host_buffer", note),
        mock.patch.object(partita.units.residence.gathered, "host_buffer", note),
    ):
        yield made
