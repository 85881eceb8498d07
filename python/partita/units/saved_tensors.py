"""What autograd saves in a forward of gathered parameters.

[Note: saved parameters]
Autograd keeps tensors of a forward for its backward, and many of them are views of gathered parameters: the weight of a
product, its transpose, a slice of it. Such a view keeps the storage of its unit's home and not the memory of it, see
[Note: home] in `residence/transient.py`. So a hook on saved tensors asks for the unit when autograd asks for the view.
What a module returned, and in which form, does not matter.

torch calls the innermost pair of such hooks only, and compares no versions where there are any. So these hooks hand all
other tensors to the pair that was there before them (`save_on_cpu()` around the engine, or a checkpoint), and where
there was none they compare the versions, as torch does without hooks.

A pair that a program puts inside of a forward takes the place of these hooks in its block. `save_on_cpu()` copies the
parameters then. A checkpoint without reentrance computes its forward again, and keeps what that saves for as long as
the nodes of its block run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from partita.units.absent import AbsentParameterError
from partita.units.residence import Residence

_stack: Any = torch._C._autograd  # where the hooks are kept, one stack per thread

Pack = Callable[[Tensor], Any]
Unpack = Callable[[Any], Tensor]


class SavedTensors:
    """The hooks on saved tensors of one model.

    Args:
        asked: called with the number of a unit whose values autograd is about to use. Brings the values if they are not
            here.
    """

    def __init__(self, asked: Callable[[int], None]) -> None:
        self.asked = asked
        self._units: dict[int, tuple[int, Residence]] = {}  # by the storage of the home
        self._storages: dict[int, int] = {}  # the reverse
        own = weakref.ref(self)  # a graph may outlive the engine, and must not keep its units
        self._pack, self._unpack = partial(_pack, own, None), partial(_unpack, own, None)
        self._entered: list[Pack | None] = []

    def locate(self, number: int, residence: Residence) -> None:
        """Notes where the home of a unit is now: a home may be replaced while nobody uses the unit."""
        storage = residence.home_storage
        if self._storages.get(number) != storage:
            self._units.pop(self._storages.get(number, 0), None)
            self._units[storage] = number, residence
            self._storages[number] = storage

    def enter(self) -> None:
        """A module begins its forward: these hooks become the innermost ones."""
        self._entered.append(None)
        if not _stack._saved_tensors_hooks_is_enabled():  # inside of a transformation of torch.func
            return
        before: tuple[Pack, Unpack] | None = _stack._top_saved_tensors_default_hooks(False)
        if before is None:
            pack, unpack = self._pack, self._unpack
        elif isinstance(before[0], partial) and before[0].args[:1] == self._pack.args[:1]:
            return  # they are the innermost ones
        else:
            own = self._pack.args[0]
            pack, unpack = partial(_pack, own, before[0]), partial(_unpack, own, before[1])
        _stack._push_saved_tensors_default_hooks(pack, unpack)
        self._entered[-1] = pack

    def leave(self) -> None:
        """The reverse of `enter`."""
        pack = self._entered.pop()
        top = None if pack is None else _stack._top_saved_tensors_default_hooks(False)
        if top is not None and top[0] is pack:
            _stack._pop_saved_tensors_default_hooks()

    def leave_all(self) -> None:
        """No forward is under way."""
        while self._entered:
            self.leave()

    def unit_of(self, tensor: Tensor) -> int | None:
        """The number of the unit in whose home a tensor lies."""
        try:
            storage = tensor.untyped_storage()._cdata
        except (NotImplementedError, RuntimeError):  # a sparse tensor, say
            return None
        found = self._units.get(storage)
        # A home may have been replaced since it was noted, and another tensor may lie where it was.
        return found[0] if found is not None and found[1].home_storage == storage else None

    def used(self, tensor: Tensor) -> int | None:
        """`unit_of`, for a tensor that an operation has used on the current stream."""
        if (number := self.unit_of(tensor)) is not None:
            self._units[self._storages[number]][1].join()
        return number


# The hooks. They hold a weak reference, as the graph holds them. What they make of a tensor is what is kept of it, the
# version of the tensor, and the number of the unit that it is a view of. Only one of the last two matters.

_Packed = tuple[Any, int, int | None]


def _pack(own: weakref.ref[SavedTensors], outer: Pack | None, tensor: Tensor) -> _Packed:
    saved = own()
    unit = None if saved is None else saved.used(tensor)
    if outer is not None and unit is None:
        return outer(tensor), -1, None
    # Detached: an operation may save what it returns, and would hold itself. The version is shared all the same.
    return tensor.detach(), tensor._version, unit


def _unpack(own: weakref.ref[SavedTensors], outer: Unpack | None, packed: _Packed) -> Tensor:
    tensor, version, unit = packed
    if version < 0:
        assert outer is not None
        return outer(tensor)
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"{tensor.type()} of shape {tuple(tensor.shape)} is at version {tensor._version}, expected version "
            f"{version}; find the operation with torch.autograd.set_detect_anomaly(True)"
        )
    if unit is not None:
        saved = own()
        if saved is not None and saved.unit_of(tensor) is not None:
            saved.asked(unit)
        if tensor.numel() and not tensor.untyped_storage().nbytes():  # lest it reach an address
            raise AbsentParameterError(
                "what autograd saved of a partitioned parameter (ZeRO stage 3) is asked for outside of a backward, or "
                "after the engine that has its values was destroyed"
            )
    return tensor  # type: ignore[no-any-return]
