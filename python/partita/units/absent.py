"""Parameters whose values are not here.

[Note: absent parameters]
A parameter of stage 3 stays the same object all its life, but has memory only while it computes. In between its class
is `AbsentParameter`: what describes it (shape, dtype, .grad, ...) can be asked, everything else raises an error that
names it. Operations inside autograd do not look at the class. Torch refuses some of them, as the storage has no memory,
and others end the process. So when an engine is destroyed, the class stays until somebody gives the parameter memory
(`Module.to_empty()`, `.data =`): a parameter without memory must not look like one that has some.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from partita.comm import Communicator


class AbsentParameterError(RuntimeError):
    """A parameter was used while its values are not on this rank."""


@dataclass(frozen=True)
class ShardRun:
    """A run of a parameter's elements that are this rank's to write.

    first: in the flattened parameter. memory: flat, of the parameter's dtype.
    """

    parameter: nn.Parameter
    first: int
    memory: Tensor


class Holder(Protocol):
    """What has the values of parameters while the parameters are absent: the unit that they are in."""

    parameters: list[nn.Parameter]
    dtype: torch.dtype
    communicator: Communicator

    def name_of(self, parameter: nn.Parameter) -> str:
        """For people."""

    def bring(self) -> bool:
        """Whether the parameters are here now: when the model computes, they are brought when they are asked for."""

    def whole(self) -> AbstractContextManager[Callable[[nn.Parameter], Tensor]]:
        """Inside the block, the values of each of the parameters, to be read only. A collective."""

    def pin(self) -> None:
        """Brings the values into memory that belongs to this rank alone, so that writing there reaches no other rank
        until `commit`. A collective; pins are counted."""

    def unpin(self) -> None:
        """The reverse of `pin`. What was written in between and not committed is forgotten."""

    def commit(self, parameters: list[nn.Parameter]) -> None:
        """What was written into these pinned parameters, the same on every rank, becomes their values. A collective."""

    def shard_runs(self, parameters: list[nn.Parameter]) -> list[ShardRun] | None:
        """This rank's part of these parameters. None, on all ranks: they cannot be written in parts now, or at all."""

    def writing_shards(self, parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
        """Inside the block, each rank writes all of its `shard_runs`, which are the values then. A collective."""


class _Held:
    """Who holds a parameter: an attribute of it which is not pickled with it, as a holder cannot be."""

    def __init__(self, find: Callable[[], Holder | None]) -> None:
        self.find = find

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()  # what torch.load() takes with weights_only, too


def holder_of(parameter: Tensor) -> Holder | None:
    """Who has the parameter's values; None for one that nobody has taken, or whose engine is gone."""
    held = getattr(parameter, "_partita_holder", None)
    return held.find() if isinstance(held, _Held) else None


def holders_of(state: Mapping[str, Any]) -> dict[Holder | None, list[str]]:
    """The names of a state dict by who has the values; None: of what is here."""
    names: dict[Holder | None, list[str]] = {}
    for name, value in state.items():
        names.setdefault(holder_of(value) if isinstance(value, Tensor) else None, []).append(name)
    return names


def give_to(find: Callable[[], Holder | None], parameters: Iterable[nn.Parameter]) -> None:
    """From now on `holder_of()` answers what this function does: a holder, while it is there."""
    for parameter in parameters:
        parameter._partita_holder = _Held(find)  # type: ignore[attr-defined]


def drop_holder(parameters: Iterable[nn.Parameter]) -> None:
    """Nobody holds the parameters any more."""
    for parameter in parameters:
        if hasattr(parameter, "_partita_holder"):
            del parameter._partita_holder


def make_absent(parameters: Iterable[nn.Parameter]) -> None:
    """Their use raises, until `make_present`."""
    for parameter in parameters:
        if type(parameter) is not AbsentParameter:
            parameter._partita_class = type(parameter)  # type: ignore[attr-defined]
            parameter.__class__ = AbsentParameter


def make_present(parameters: Iterable[nn.Parameter]) -> None:
    """They can be used again."""
    for parameter in parameters:
        if type(parameter) is AbsentParameter:
            parameter.__class__ = parameter._partita_class  # type: ignore[attr-defined]
            del parameter._partita_class  # type: ignore[attr-defined]
            vars(parameter).pop("_partita_gone", None)


def make_gone(parameter: nn.Parameter, name: str) -> None:
    """An absent parameter has no values any more, anywhere. Its use raises until it is given memory."""
    parameter._partita_gone = name  # type: ignore[attr-defined]


def take_back(parameter: nn.Parameter, values: Tensor) -> None:
    """The parameter has these values again, in memory of its own, and no holder."""
    make_present([parameter])
    drop_holder([parameter])
    parameter.data = values


class AbsentParameter(nn.Parameter):
    """See [Note: absent parameters]."""

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        self.detach()  # raises, unless this brings the values: inside zero.Init()
        copied: nn.Parameter = copy.deepcopy(self, memo)  # as what it is now: a copy is of the class of values
        return copied

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in DESCRIBING:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        absent: Any = next((p for p in _tensors(args, kwargs) if type(p) is cls), None)
        gone = getattr(absent, "_partita_gone", None)
        if gone is not None and func == Tensor.data.__set__:  # type: ignore[attr-defined]
            make_present([absent])
            return func(*args, **(kwargs or {}))
        holder = None if absent is None or func is Tensor.__repr__ else holder_of(absent)
        if holder is not None and gone is None and holder.bring():
            return func(*args, **(kwargs or {}))
        name = gone or _name(absent)
        if func is Tensor.__repr__:
            return f"AbsentParameter('{name}', shape={None if absent is None else tuple(absent.shape)})"
        used = f"parameter '{name}' is used ({getattr(func, '__name__', func)})"
        if gone is not None:
            raise AbsentParameterError(
                f"{used} and has no values any more: the engine that partitioned it (ZeRO stage 3) was destroyed; take "
                "engine.module_state_dict() before that, or give the model memory with model.to_empty(device=...) and "
                "load weights"
            )
        raise AbsentParameterError(
            f"{used} while its values are partitioned over the ranks (ZeRO stage 3): they are there in the forward of "
            "the module that they are registered in. Elsewhere, read them inside `with "
            "partita.zero.GatheredParameters([parameter])`, write them with modifier_rank=, and take a state dict from "
            "engine.module_state_dict()"
        )


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Iterable[Any]:
    for value in (*args, *(kwargs or {}).values()):
        if isinstance(value, list | tuple):
            yield from value
        else:
            yield value


def _name(parameter: Any) -> str:
    holder = None if parameter is None else holder_of(parameter)
    return "(of an engine that is gone)" if holder is None else holder.name_of(parameter)


# What describes a parameter.
_READABLE = """shape dtype device layout requires_grad grad grad_fn grad_dtype is_leaf ndim names nbytes itemsize
is_cuda is_cpu is_meta is_mps is_xpu is_mkldnn is_sparse is_sparse_csr is_quantized is_nested _version _backward_hooks
_post_accumulate_grad_hooks output_nr retains_grad"""
_WRITABLE = "grad grad_dtype requires_grad _backward_hooks"
_CALLABLE = """size stride dim numel nelement ndimension element_size storage_offset is_floating_point is_complex
is_contiguous is_signed untyped_storage requires_grad_ register_hook register_post_accumulate_grad_hook get_device
__len__"""

DESCRIBING: set[Any] = {
    *(getattr(Tensor, name).__get__ for name in _READABLE.split() if hasattr(Tensor, name)),
    *(getattr(Tensor, name).__set__ for name in _WRITABLE.split() if hasattr(Tensor, name)),
    *(getattr(Tensor, name) for name in _CALLABLE.split()),
    torch.empty_like,  # these two are what Module.to_empty() asks before it gives memory
    torch._has_compatible_shallow_copy_type,
}
