"""A storage whose bytes are spread over the ranks: what has parameters from `zero.Init` until an engine takes them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from partita.comm import Communicator
from partita.device.memory import flat_buffer, host_buffer
from partita.units import ShardRun, drop_holder, give_to, holder_of, make_absent, make_present

SLICE_ALIGNMENT_BYTES = 128


@dataclass(frozen=True)
class ShardMemory:
    """Where shards are kept. on_host: in host memory, wherever the parameters are; pin: in pinned memory there."""

    on_host: bool = False
    pin: bool = False

    def empty(self, nbytes: int, device: torch.device) -> Tensor:
        """Memory for a shard of a parameter of this device."""
        if self.on_host:
            pins = self.pin and device.type == "cuda"
            with torch.cuda.device(device) if pins else nullcontext():  # no engine has made it the current one yet
                return host_buffer(nbytes, torch.uint8, pins)
        return flat_buffer(nbytes, torch.uint8, device)


class Lease:
    """A communicator that is closed when nothing needs it any more. Closing is no collective."""

    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator
        weakref.finalize(self, communicator.close).atexit = False


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in its storage: its name for people, and the arguments of `Tensor.set_`."""

    name: str
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    strides: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie one behind the other."""
        dense = 1
        for length, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if length > 1 and stride != dense:
                return False
            dense *= length
        return True


class PartitionedStorage:
    """The memory of one parameter, or of several that share it. Each rank keeps a slice of the bytes.

    [Note: partitioned storages]
    What comes and goes is the memory of a storage. So a parameter stays the same object of the same class, and all
    views of it come and go with it: `p.detach()`, `p.data`, `nn.Parameter(p)`. While a model is built, every operation
    looks up the storages of its arguments, whatever kind of tensors the arguments are (see `Partitioner`). Afterwards
    nothing looks: then parameters without memory are of the class `AbsentParameter`, and a storage that others than
    the parameters have views of is left to those others, with its memory, while the parameters get another storage.

    This class is the parameters' `Holder`. Its memory is there from the beginning; the first `commit` makes the shards.

    Args:
        parameter: its storage is partitioned; it is dense, and has memory.
        guards: whether parameters without memory refuse their use.
    """

    def __init__(self, parameter: nn.Parameter, lease: Lease, memory: ShardMemory, *, guards: bool = False) -> None:
        self._lease = lease
        self.communicator = lease.communicator
        self.dtype = parameter.dtype
        self.guards = guards
        self.parameters: list[nn.Parameter] = []
        self._places: dict[int, Place] = {}
        storage = parameter.untyped_storage()
        self._is_own = storage.resizable()  # else it is a file's or numpy's, and stays with whoever has it
        self._storage = storage
        self.nbytes = storage.nbytes()
        world_size = self.communicator.world_size
        self._slice_bytes = -(-self.nbytes // (world_size * SLICE_ALIGNMENT_BYTES)) * SLICE_ALIGNMENT_BYTES
        self._shard = memory.empty(self._slice_bytes, parameter.device)
        self.is_here = True
        self._pins = 0

    @property
    def key(self) -> int:
        """The storage, as `key_of` tells it of a tensor."""
        return int(self._storage._cdata)

    @property
    def device(self) -> torch.device:
        """Where the whole values are, when they are here."""
        return self._storage.device

    def join(self, parameter: nn.Parameter, name: str) -> None:
        """A parameter that is a view of the storage is one of this holder's from now on."""
        offset = int(parameter.storage_offset())
        place = Place(name, parameter.dtype, offset, parameter.shape, parameter.stride())
        self.parameters.append(parameter)
        self._places[id(parameter)] = place
        give_to(lambda: self, [parameter])

    def take_moved(self) -> list[tuple[nn.Parameter, str]]:
        """Gives up the parameters whose memory was replaced, by assigning `.data` for instance; with their names."""
        moved = [(p, self.name_of(p)) for p in self._own_parameters() if key_of(p) != self.key]
        for parameter, _ in moved:
            self._forget(parameter)
            drop_holder([parameter])
        return moved

    def describe(self) -> str:
        """The same text on all ranks that build the same model."""
        places = [self._places[id(p)] for p in self._own_parameters()]
        return ", ".join(f"{place.name} {tuple(place.shape)} {place.dtype}" for place in places)

    def has_other_views(self) -> bool:
        """Whether tensors beside the parameters use the storage."""
        uses: int = torch._C._storage_Use_Count(self.key)
        return uses > 1 + sum(key_of(p) == self.key for p in self._own_parameters())

    # -- see `Holder`

    def name_of(self, parameter: nn.Parameter) -> str:
        """The module's class and the name in it, as the model has no name yet."""
        return self._places[id(parameter)].name

    def bring(self) -> bool:
        """No model computes with these parameters before an engine takes them."""
        return False

    @contextmanager
    def whole(self) -> Iterator[Callable[[nn.Parameter], Tensor]]:
        """Values to be read only."""
        self.pin()
        try:
            yield lambda parameter: parameter.detach()
        finally:
            self.unpin()

    def pin(self) -> None:
        """Brings the values. A collective, unless they are here."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
            if not self.is_here:
                full = self._bytes(self._slice_bytes * self.communicator.world_size)
                self.communicator.slice_of(full).copy_(self._shard)
                self.communicator.all_gather(full).wait()
                self.is_here = True
            make_present(self._own_parameters())
        self._pins += 1

    def unpin(self) -> None:
        """The memory goes with the last pin; what was written and not committed is forgotten."""
        if not self._pins:
            raise RuntimeError(f"unpin() of the storage of parameter '{self._first_name()}', which is not pinned")
        self._pins -= 1
        if not self._pins:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                self._leave()

    def commit(self, parameters: list[nn.Parameter]) -> None:
        """What is in the storage, the same on all ranks, becomes the values. No collective.

        Raises:
            ValueError: one of the parameters has been given values of another shape; names it.
        """
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for parameter in parameters:
                if id(parameter) in self._places and key_of(parameter) != self.key:
                    self._bring_back(parameter)
            begin = min(self._slice_bytes * self.communicator.rank, self.nbytes)
            end = min(begin + self._slice_bytes, self.nbytes)
            self._shard[: end - begin].copy_(self._bytes(self.nbytes)[begin:end])

    def shard_runs(self, parameters: list[nn.Parameter]) -> list[ShardRun] | None:
        """This rank's part of these parameters, see `Holder`."""
        places = [self._places.get(id(parameter)) for parameter in parameters]
        if self.is_here:
            return None
        runs = []
        begin = self._slice_bytes * self.communicator.rank
        for parameter, place in zip(parameters, places, strict=True):
            if place is None or not place.is_contiguous:
                return None
            first, size = place.offset * place.dtype.itemsize, place.dtype.itemsize
            start = max(begin, first)
            stop = min(begin + self._slice_bytes, first + place.shape.numel() * size)
            if start < stop:
                memory = self._shard[start - begin : stop - begin].view(place.dtype)
                runs.append(ShardRun(parameter, (start - first) // size, memory))
        return runs

    @contextmanager
    def writing_shards(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Inside the block, each rank writes its `shard_runs`, which no other rank reads."""
        yield

    def guard(self) -> None:
        """Nothing looks up storages any more: from now on parameters without memory refuse their use."""
        self.guards = True
        if not self.is_here:
            make_absent(self._own_parameters())

    def _leave(self) -> None:
        own = self._own_parameters()
        if not self._is_own or not self._storage.resizable() or (self.guards and self.has_other_views()):
            self._storage = torch.empty(self.nbytes, dtype=torch.uint8, device=self._storage.device).untyped_storage()
            self._is_own = True
        for parameter in own:
            if key_of(parameter) != self.key:  # of a storage left to others, or as its .data was assigned
                parameter.data = self._view(self._places[id(parameter)])
        self._storage.resize_(0)
        self.is_here = False
        if self.guards:
            make_absent(own)

    def _bring_back(self, parameter: nn.Parameter) -> None:
        """What a parameter has in memory of its own is written to its place."""
        place = self._places[id(parameter)]
        if parameter.shape != place.shape:
            raise ValueError(
                f"parameter '{place.name}' of shape {tuple(place.shape)} was given values of shape "
                f"{tuple(parameter.shape)}"
            )
        view = self._view(place).copy_(parameter.detach())
        parameter.data = view

    def _own_parameters(self) -> list[nn.Parameter]:
        """Without those that others have taken meanwhile: an engine, say."""
        for parameter in [p for p in self.parameters if holder_of(p) is not self]:
            self._forget(parameter)
        return self.parameters

    def _forget(self, parameter: nn.Parameter) -> None:
        self.parameters = [p for p in self.parameters if p is not parameter]
        del self._places[id(parameter)]

    def _bytes(self, nbytes: int) -> Tensor:
        """The first bytes of the storage, which grows where it has fewer."""
        if self._storage.nbytes() < nbytes:
            self._storage.resize_(nbytes)
        return torch.empty(0, dtype=torch.uint8, device=self._storage.device).set_(self._storage, 0, (nbytes,), (1,))

    def _view(self, place: Place) -> Tensor:
        empty = torch.empty(0, dtype=place.dtype, device=self._storage.device)
        return empty.set_(self._storage, place.offset, place.shape, place.strides)

    def _first_name(self) -> str:
        return next((place.name for place in self._places.values()), "")


def key_of(tensor: Tensor) -> int | None:
    """The storage that a tensor is a view of, as a number; None if it has none."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse, or opaque
        return None
