"""A machine that has a GPU, on which a model on the CPU is trained: nothing may touch the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any, NoReturn
from unittest import mock

import torch
from partita import _core

# Whether there is a GPU, and whether the program uses it, touches none. A seed waits until the program does.
HARMLESS: dict[str, Any] = {
    "is_available": lambda: True,
    "is_initialized": lambda: False,
    "is_current_stream_capturing": lambda: False,  # torch's optimizers ask
    "manual_seed": lambda _seed: None,
    "manual_seed_all": lambda _seed: None,
}
CLASSES = {"CUDAGraph", "Event", "Stream", "ExternalStream", "StreamContext", "device", "device_of"}


@contextmanager
def untouched_gpu() -> Iterator[None]:
    """In this block torch and the native core have a GPU, and whoever asks torch.cuda for more than that gets an error;
    so does the block, where that error was caught."""
    touched: list[str] = []

    def refuse(name: str) -> Any:
        def call(*_args: Any, **_kwargs: Any) -> NoReturn:
            touched.append(name)
            raise AssertionError(f"torch.cuda.{name} is called, and the model is on the CPU")

        return call

    def unpinned(make: Callable[..., Any]) -> Any:
        def call(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
            return refuse("pin_memory")() if pin_memory else make(*args, **kwargs)

        return call

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(_core, "built_with_cuda", lambda: True))
        for name, value in list(vars(torch.cuda).items()):
            is_own = not name.startswith("_") and getattr(value, "__module__", "").partition(".")[0] == "torch"
            if name in HARMLESS:
                patches.enter_context(mock.patch.object(torch.cuda, name, HARMLESS[name]))
            elif name in CLASSES or (is_own and isinstance(value, FunctionType)):
                patches.enter_context(mock.patch.object(torch.cuda, name, refuse(name)))
        patches.enter_context(mock.patch.object(torch.Tensor, "pin_memory", refuse("pin_memory")))
        for make in (torch.empty, torch.zeros):
            patches.enter_context(mock.patch.object(torch, make.__name__, unpinned(make)))
        yield
    assert not touched, touched
