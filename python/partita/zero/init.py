"""Building a model whose parameters never exist as a whole on any rank."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from partita.comm import Communicator, backend_for, init_distributed, ranks_that_differ, world_communicator
from partita.config import load_config
from partita.device.memory import FreedMemory
from partita.units import DESCRIBING, FlatParameters, Gathered, ParameterInfo, give_to, holder_of, make_layout

if TYPE_CHECKING:
    from partita.config import Config


class Init:
    """Modules that are constructed inside the block are partitioned over the ranks as they are built.

    Each rank computes the same values, from rank 0's random state, and keeps its part; so a model comes out with the
    same weights as one that is built on rank 0 without `Init`. Whole parameters exist for one module at a time: the one
    that registers parameters, or whose parameters were used last. Code inside the block may use any parameter at any
    time (`model.apply(init_weights)`, `for p in self.parameters(): nn.init.normal_(p)`), the same on all ranks.

    `partita.initialize()` takes the result in any stage. Until then, `GatheredParameters` reads and writes it.

    Args:
        config: as for `initialize()`, of which only `comm` matters here; None: the defaults.
        dtype: of the floating-point parameters that are created; None: torch's default.
        enabled: false builds the model as without `Init`.

    Raises:
        RuntimeError: when the block ends: ranks drew different random numbers, so they built different models.
    """

    def __init__(self, config: Any = None, dtype: torch.dtype | None = None, enabled: bool = True) -> None:
        self._config: Config | None = None if config is None else load_config(config)
        self._dtype = dtype
        self._enabled = enabled
        self._exits = ExitStack()

    def __enter__(self) -> Init:
        if not self._enabled:
            return self
        with ExitStack() as exits:
            partitioner = Partitioner(self._config)
            exits.callback(partitioner.close)
            exits.enter_context(SameRandomNumbers(partitioner.communicator(torch.device("cpu"))))
            if self._dtype is not None:
                exits.callback(torch.set_default_dtype, torch.get_default_dtype())
                torch.set_default_dtype(self._dtype)
            hook = register_module_parameter_registration_hook(partitioner.registered)
            exits.callback(hook.remove)
            exits.enter_context(Uses(partitioner.used))
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._exits.__exit__(*error)


class Partitioner:
    """Partitions parameters one module at a time."""

    def __init__(self, config: Config | None = None) -> None:
        self._comm = (config or load_config({"train_micro_batch_size_per_gpu": 1})).comm
        self._freed = FreedMemory()
        self._communicators: dict[torch.device, Communicator] = {}
        self._open: dict[int, tuple[nn.Parameter, str]] = {}  # whole parameters, of one module
        self._module: nn.Module | None = None  # the one that registered them; None: they were taken before

    def communicator(self, device: torch.device) -> Communicator:
        """Of the ranks, for tensors on a device."""
        if device not in self._communicators:
            init_distributed(backend_for(device))
            timeout = timedelta(seconds=self._comm.timeout_seconds)
            self._communicators[device] = world_communicator(self._comm.transport, timeout, device)
        return self._communicators[device]

    def registered(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        """A module gets a parameter, whose values may not be there yet."""
        if parameter is None or parameter.is_meta or holder_of(parameter) is not None:
            return
        if module is not self._module:
            self.close()
            if holder_of(parameter) is not None:  # now: it was another module's, too
                return
            self._module = module
        self._open[id(parameter)] = (parameter, f"{type(module).__name__}.{name}")

    def used(self, parameters: list[nn.Parameter]) -> None:
        """An operation is about to use these parameters; the whole ones of other modules may go."""
        if all(id(p) in self._open for p in parameters):
            return
        self.close()
        for parameter in parameters:
            holder = holder_of(parameter)
            if holder is not None and id(parameter) not in self._open:
                holder.pin()
                self._open[id(parameter)] = (parameter, holder.name_of(parameter))

    def close(self) -> None:
        """No parameter is whole any more."""
        opened, self._open, self._module = self._open, {}, None
        with torch._C.DisableTorchFunction():  # these are not uses
            for parameter, name in opened.values():
                holder = holder_of(parameter)
                if holder is None:
                    partition(parameter, name, self.communicator(parameter.device))
                else:
                    if parameter.dtype != holder.dtype:
                        raise TypeError(
                            f"parameter '{name}' was converted from {holder.dtype} to {parameter.dtype} inside "
                            "partita.zero.Init(): give Init that dtype="
                        )
                    holder.commit([parameter])
                    holder.unpin()
                self._freed.add(parameter.nbytes)


@torch.no_grad()
def partition(parameter: nn.Parameter, name: str, communicator: Communicator) -> None:
    """Each rank keeps its part of a parameter that has the same values on all of them."""
    if communicator.world_size == 1:
        return
    info = ParameterInfo(name, tuple(parameter.shape), 0, parameter.element_size(), str(parameter.dtype))
    layout = make_layout([info], communicator.world_size)
    own = layout.shard_range(communicator.rank)
    flat = FlatParameters(Gathered(layout, [parameter], parameter.dtype, own, communicator))
    values = parameter.detach().reshape(-1)[own.start : own.stop]
    flat.own_params[: values.numel()] = values
    flat.take_parameters()
    give_to(lambda: flat, [parameter])  # nobody else keeps it


class SameRandomNumbers:
    """Every rank draws rank 0's numbers from torch; afterwards it goes on with its own, if they were others.

    Raises:
        RuntimeError: at the end, on all ranks, if they did not draw the same numbers.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._own: list[Tensor] = []
        self._differed = False

    def __enter__(self) -> None:
        self._own = _random_states()
        shared = [state.clone() for state in self._own]
        for state in shared:
            self._communicator.broadcast(state, 0).wait()
        self._differed = any(not torch.equal(a, b) for a, b in zip(self._own, shared, strict=True))
        _set_random_states(shared)

    def __exit__(self, kind: Any, *_: Any) -> None:
        now = _random_states()
        if self._differed:
            _set_random_states(self._own)
        if kind is not None or self._communicator.world_size == 1:
            return
        different = ranks_that_differ(self._communicator, b"".join(state.numpy().tobytes() for state in now))
        if different:
            raise RuntimeError(
                f"ranks built different models inside partita.zero.Init(): rank {', '.join(map(str, different))} drew "
                "other random numbers than rank 0; build the same modules in the same order on every rank"
            )


def _random_states() -> list[Tensor]:
    on_gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return [torch.get_rng_state(), *on_gpu]


def _set_random_states(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)


class Uses(TorchFunctionMode):
    """Tells which parameters operations are about to use."""

    def __init__(self, used: Callable[[list[nn.Parameter]], None]) -> None:
        super().__init__()
        self._used = used

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        values = [*args, *(kwargs or {}).values()]
        lists = [item for value in values if isinstance(value, list | tuple) for item in value]
        parameters = [p for p in values + lists if isinstance(p, nn.Parameter) and holder_of(p) is not None]
        if parameters and func not in DESCRIBING:
            with torch._C.DisableTorchFunction():
                self._used(parameters)
        return func(*args, **(kwargs or {}))
