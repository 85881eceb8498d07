"""While a model is built: its parameters are partitioned one module at a time, and come when an operation uses them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from partita.comm import (
    Communicator,
    any_rank_each,
    join_job,
    ranks_that_differ,
    world_communicator,
)
from partita.device import HOST
from partita.device.kernels import why_no_address
from partita.device.memory import FreedMemory
from partita.units import DESCRIBING, Holder, holder_of
from partita.zero.random_numbers import SameRandomNumbers
from partita.zero.storage import Lease, PartitionedStorage, ShardMemory, key_of

if TYPE_CHECKING:
    from partita.config import Config


class Partitioner:
    """Partitions parameters as modules register them.

    Whole parameters exist for one module at a time: the one that registers parameters, or whose parameters an operation
    uses. `_open` are their holders, each pinned once, with the parameters that were used. See
    [Note: partitioned storages].
    """

    def __init__(self, config: Config, memory: ShardMemory) -> None:
        self._comm = config.comm
        self._memory = memory
        self._freed = FreedMemory()
        self._leases: dict[torch.device, Lease] = {}
        self._storages: dict[int, PartitionedStorage] = {}  # by key, in the order in which they were met
        self._open: dict[Holder, list[nn.Parameter]] = {}
        self._module: nn.Module | None = None  # the one that registered what is open; None: it was taken before

    def communicator(self, device: torch.device) -> Communicator:
        """Of the ranks, for tensors on a device."""
        return self._lease(device).communicator

    def registered(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        """A module gets a parameter, whose values may not be there yet."""
        if parameter is None or not self._can_have(parameter):
            return
        with torch._C.DisableTorchFunction(), torch.no_grad():
            if module is not self._module:
                self.close()
                self._module = module
            self._adopt(parameter, f"{type(module).__name__}.{name}")

    def brought(self, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        """A module that was built before has this parameter, which has other values on other ranks."""
        if self._can_have(parameter):
            with torch._C.DisableTorchFunction(), torch.no_grad():
                values = parameter.detach().contiguous()
                self.communicator(parameter.device).broadcast(values, 0).wait()
                parameter.copy_(values)
            self.registered(module, name, parameter)

    def copied(self, original: nn.Parameter, copy: nn.Parameter) -> None:
        """A deep copy was made: modules do not register the parameters of copied modules."""
        holder = holder_of(original)  # None: built before, and perhaps not the same on all ranks
        if holder is not None and self._can_have(copy):
            with torch._C.DisableTorchFunction(), torch.no_grad():
                self._adopt(copy, holder.name_of(original))

    def used(self, tensors: Iterable[Tensor]) -> None:
        """An operation is about to use these tensors; the whole parameters of other modules may go."""
        holders = self._holders(tensors)
        if all(self._is_whole(holder) for holder in holders):
            return
        self._adopt_moved()
        holders = self._holders(tensors)
        self.close(keep=holders)
        for holder, parameters in holders.items():
            if not self._is_whole(holder):
                holder.pin()
                self._open[holder] = []
            if holder in self._open:
                self._open[holder] += parameters

    def close(self, keep: Iterable[Holder] = ()) -> None:
        """No parameter is whole any more, but for those of some holders."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
            self._adopt_moved()
            kept = set(keep)
            closing = [holder for holder in self._open if holder not in kept]
            self._module = None
            for holder in closing:
                parameters = self._open.pop(holder)
                holder.commit(parameters)
                if not isinstance(holder, PartitionedStorage):
                    holder.unpin()
                    continue
                del self._storages[holder.key]  # which changes where a storage is left to others
                holder.unpin()
                self._storages[holder.key] = holder
                self._freed.add(holder.nbytes, holder.device)

    def finish(self, failed: bool) -> None:
        """Nothing looks up storages any more. A collective, unless the model could not be built.

        Raises:
            RuntimeError: ranks have other parameters than rank 0; on all ranks.
        """
        self.close()
        storages, self._storages = list(self._storages.values()), {}
        if not failed:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                self._settle(storages)
        for storage in storages:
            storage.guard()

    def _settle(self, storages: list[PartitionedStorage]) -> None:
        """Storages that others have views of get their memory back, as it stays with those others."""
        by_communicator: dict[Communicator, list[PartitionedStorage]] = {}
        for storage in storages:
            by_communicator.setdefault(storage.communicator, []).append(storage)
        everything = "; ".join(storage.describe() for storage in storages)
        if different := ranks_that_differ(self.communicator(HOST), everything.encode()):
            raise RuntimeError(
                f"ranks built different models inside partita.zero.Init(): rank {', '.join(map(str, different))} has "
                "other parameters than rank 0; build the same modules in the same order on every rank"
            )
        for communicator, held in by_communicator.items():
            # Asked of all ranks, as a view that nobody can reach any more may still be there on some of them.
            viewed = any_rank_each(communicator, [storage.has_other_views() for storage in held])
            for storage in (storage for storage, is_viewed in zip(held, viewed, strict=True) if is_viewed):
                storage.pin()
                storage.guards = True
                storage.unpin()

    def _can_have(self, parameter: nn.Parameter) -> bool:
        """Whether this is a parameter that nobody has, and whose memory can be partitioned."""
        with torch._C.DisableTorchFunction():
            if holder_of(parameter) is not None or why_no_address(parameter) is not None:
                return False
            return self.communicator(parameter.device).world_size > 1

    def _adopt(self, parameter: nn.Parameter, name: str) -> None:
        """The parameter's storage is partitioned, and open."""
        key = key_of(parameter)
        assert key is not None  # as it has an address
        holder = self._storages.get(key)
        if holder is None:
            holder = PartitionedStorage(parameter, self._lease(parameter.device), self._memory)
            self._storages[key] = holder
        holder.join(parameter, name)
        if holder not in self._open:
            holder.pin()
            self._open[holder] = []

    def _adopt_moved(self) -> None:
        """Parameters whose `.data` was assigned are in another storage now."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
            moved = [m for holder in self._open if isinstance(holder, PartitionedStorage) for m in holder.take_moved()]
            for parameter, name in moved:
                if self._can_have(parameter):
                    self._adopt(parameter, name)

    def _holders(self, tensors: Iterable[Tensor]) -> dict[Holder, list[nn.Parameter]]:
        """What has the values of these tensors, with those of them that are its parameters."""
        found: dict[Holder, list[nn.Parameter]] = {}
        for tensor in tensors:
            key = key_of(tensor)
            holder: Holder | None = None if key is None else self._storages.get(key)
            if holder is None:
                holder = holder_of(tensor)  # an engine, or a model that was built before
                if isinstance(holder, PartitionedStorage):
                    if holder.key != key:  # the tensor has memory of its own since its .data was assigned
                        continue
                    holder.guards = False
                    self._storages[holder.key] = holder
            if holder is not None:
                own = found.setdefault(holder, [])
                if isinstance(tensor, nn.Parameter) and holder_of(tensor) is holder:
                    own.append(tensor)
        return found

    def _is_whole(self, holder: Holder) -> bool:
        # A storage that GatheredParameters has pinned needs nothing, and there ranks may do different things.
        return holder in self._open or (isinstance(holder, PartitionedStorage) and holder.is_here)

    def _lease(self, device: torch.device) -> Lease:
        if device not in self._leases:
            with torch._C.DisableTorchFunction():
                timeout = timedelta(seconds=self._comm.timeout_seconds)
                join_job(timeout)
                self._leases[device] = Lease(world_communicator(self._comm.transport, timeout, device))
        return self._leases[device]


class Uses(TorchFunctionMode):
    """Tells a partitioner which tensors operations of this thread are about to use."""

    def __init__(self, partitioner: Partitioner) -> None:
        super().__init__()
        self.partitioner = partitioner

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in DESCRIBING:
            with torch._C.DisableTorchFunction():
                self.partitioner.used(list(_tensors([args, kwargs or {}])))
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def current_partitioner() -> Partitioner | None:
    """Of the block that this thread is in."""
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return next((mode.partitioner for mode in modes if isinstance(mode, Uses)), None)


@contextmanager
def partitioning(config: Config, memory: ShardMemory) -> Iterator[Partitioner]:
    """Inside the block, parameters are partitioned as modules register them. Blocks inside of it are part of it.

    Raises:
        RuntimeError: at the end, on all ranks: they built different models.
    """
    outer = current_partitioner()
    if outer is not None:
        yield outer
        return
    partitioner = Partitioner(config, memory)
    with ExitStack() as exits:
        exits.push(lambda kind, error, trace: partitioner.finish(failed=kind is not None))
        exits.enter_context(SameRandomNumbers(partitioner.communicator(HOST)))
        exits.callback(register_module_parameter_registration_hook(partitioner.registered).remove)
        exits.enter_context(_copies())
        exits.enter_context(Uses(partitioner))
        yield partitioner


def partition_module(module: nn.Module, config: Config, memory: ShardMemory) -> None:
    """Partitions a module that was built before. Its parameters have rank 0's values then."""
    with partitioning(config, memory) as partitioner:
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                partitioner.brought(owner, name, parameter)
            partitioner.close()


@contextmanager
def _copies() -> Iterator[None]:
    """Deep copies of parameters are told to the partitioner of the thread that makes them. Torch has no hook there."""
    plain = nn.Parameter.__deepcopy__

    def deepcopy(self: nn.Parameter, memo: dict[int, Any]) -> nn.Parameter:
        copied: nn.Parameter = plain(self, memo)  # type: ignore[no-untyped-call]
        partitioner = current_partitioner()
        if partitioner is not None and copied is not self:
            partitioner.copied(self, copied)
        return copied

    nn.Parameter.__deepcopy__ = deepcopy  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Parameter.__deepcopy__ = plain  # type: ignore[method-assign]
