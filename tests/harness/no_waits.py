"""Refuses what would make the host wait for a device, where the CPU is taken for one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import late_streams
import torch
from partita.device import HOST
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = (
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::equal",
    "aten::allclose",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique",
    "aten::_unique2",
    "aten::repeat_interleave",
)
COPIES = ("aten::copy_", "aten::_to_copy", "aten::_copy_from")
READING_METHODS = (Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.item, Tensor.__bool__, Tensor.__float__)
FROM_VALUES = (torch.tensor, torch.as_tensor, torch.from_numpy)


class HostWaitError(AssertionError):
    """The host would wait for the device, by a call that is no `HostCopy`."""


@contextmanager
def refusing_host_waits() -> Iterator[None]:
    """In this block the host may read what a copy of `LateStreams` has brought, and tensors that are made with
    `device=HOST`. All other tensors are the device's: reading their values, and moving them to or from the host's, is
    an error."""
    host = _OfTheHost()
    functions = _Functions(host)
    run_backward = torch.autograd._engine_run_backward

    def noted(kind: Any) -> Any:
        wait = kind.wait
        return mock.patch.object(kind, "wait", lambda copy: host.add(wait(copy)))

    def in_backward(*args: Any, **kwargs: Any) -> Any:
        with functions:  # off while torch's own functions run, of which a backward is one: hooks run in it
            return run_backward(*args, **kwargs)

    with (
        noted(late_streams.LateCopy),
        noted(late_streams.Snapshot),
        mock.patch.object(torch.autograd, "_engine_run_backward", in_backward),
        functions,
        _Operations(host),
    ):
        yield


class _OfTheHost:
    """The tensors of the host, by their storages."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}  # alive, so that no other storage takes the place of one

    def add(self, tensor: Tensor) -> Tensor:
        self._kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def has(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._kept

    def refuse_read(self, name: str, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if not self.has(tensor):
                raise HostWaitError(f"{name} of a tensor of the device, of shape {tuple(tensor.shape)}, {tensor.dtype}")


class _Functions(TorchFunctionMode):
    """Knows the object `HOST` by its identity, and calls that do nothing on a CPU."""

    def __init__(self, host: _OfTheHost) -> None:
        super().__init__()
        self._host = host

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READING_METHODS:
            self._host.refuse_read(func.__name__, [args[0]])
        if kwargs.get("device") is HOST:
            return self._host.add(func(*args, **kwargs))
        if func in FROM_VALUES:
            raise HostWaitError(f"{func.__name__}() on the device copies from memory that is not pinned")
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """Sees every operation, those that torch's own functions and autograd are made of too."""

    def __init__(self, host: _OfTheHost) -> None:
        super().__init__()
        self._host = host

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which would import all of torch.compile

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        tensors = [t for t in tree_leaves((args, kwargs)) if type(t) in (Tensor, torch.nn.Parameter)]
        if name in READS:
            self._host.refuse_read(name, tensors)
        if name == "aten::index":
            self._host.refuse_read("a mask", [t for t in tensors[1:] if t.dtype in (torch.bool, torch.uint8)])
        of_host = [t for t in tensors if self._host.has(t)]
        moved = [t for t in of_host if t.dim() or name in COPIES]  # a number goes along with a kernel
        if moved and len(of_host) < len(tensors):
            raise HostWaitError(f"{name} has tensors of the host and of the device")
        result = func(*args, **(kwargs or {}))
        if tensors and len(of_host) == len(tensors):
            for made in tree_leaves(result):
                if isinstance(made, Tensor):
                    self._host.add(made)
        return result
