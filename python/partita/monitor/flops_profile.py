"""The profile of the config's `flops_profiler`: FLOPs counted in one step, forward times taken in the next one."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from partita.device.streams import Streams
from partita.model import FlopCounter, modules_to_watch, takes_hooks
from partita.monitor.module_table import ModuleCosts, ProfiledStep, inclusive, summary_text, tree_text
from partita.monitor.written import write_whole

if TYPE_CHECKING:
    from partita.config.profile_keys import FlopsProfilerConfig

logger = logging.getLogger("partita")

_Mark = tuple[str, Any, Any]  # a module's name, begin and end
_FORWARDS = ("forward", "pipeline")  # phases with forwards in them


class FlopsProfile:
    """Counts and times the forwards of one micro-batch, and tells what each module has of them.

    Counting makes every operation slower, so times come from the step after. What a backward computes again is no part
    of it.

    Args:
        model: what is trained here, or a container of the stages of a pipeline.
        samples: of a micro-batch.
        micro_batches: of a phase of the name "pipeline".
        steps: so far.
        path: where the tables go; None: to the log.
    """

    def __init__(
        self,
        config: FlopsProfilerConfig,
        model: nn.Module,
        streams: Streams,
        *,
        samples: int,
        micro_batches: int,
        steps: int,
        path: Path | None,
    ) -> None:
        self._config, self._streams, self._path = config, streams, path
        self._modules = modules_to_watch(model)
        self._samples, self._micro_batches = samples, micro_batches
        self._counts_at = max(1, config.profile_step)
        self._step = steps + 1  # under way
        self._flops: Counter[str] | None = None
        self._marks: list[_Mark] | None = None
        self._divisor = 1
        self._is_told = False

    def around(self, phase: str) -> AbstractContextManager[object]:
        """Entered around each phase of a step."""
        if phase not in _FORWARDS or not torch.is_grad_enabled():
            return nullcontext()
        self._divisor = self._micro_batches if phase == "pipeline" else 1
        if self._step == self._counts_at and self._flops is None:
            return self._counting()
        if self._step == self._counts_at + 1 and self._flops is not None and self._marks is None:
            return self._timing()
        return nullcontext()

    def after_update(self, step: int) -> None:
        """A step was taken; tells what there is once both are there. On a GPU that may be after a later step, as
        nobody waits for the times."""
        self._step = step + 1
        if self._has_times:
            self.tell()

    @property
    def _has_times(self) -> bool:
        return self._marks is not None and all(self._streams.is_reached(end) for _, _, end in self._marks)

    def tell(self) -> None:
        """Writes the tables, once, if anything was counted; without times that are not there."""
        if self._flops is None or self._is_told:
            return
        self._is_told = True
        rows = self.rows()
        step = ProfiledStep(self._counts_at, self._samples, self._config.recompute_fwd_factor)
        text = summary_text(rows, step, self._config.top_modules)
        if self._config.detailed:
            text += "\n\n" + tree_text(rows, self._config.module_depth)
        if self._path is None:
            logger.info(text)
        elif write_whole(self._path, text + "\n"):
            logger.info(f"flops_profiler: the table is in {self._path}")

    def rows(self) -> list[ModuleCosts]:
        """Of all modules, depth first."""
        own = {name: float(value) for name, value in (self._flops or {}).items()}
        flops, seconds = inclusive(own, self._modules), self._seconds()
        return [
            ModuleCosts(
                name,
                type(module).__name__,
                sum(p.numel() for p in module.parameters()),  # whole, also where this rank has none of the values now
                flops[name] / self._divisor,
                None if seconds is None else seconds[name] / self._divisor,
            )
            for name, module in self._modules.items()
        ]

    def _seconds(self) -> dict[str, float] | None:
        """Of each module that was called; of one that only holds others, the sum of theirs."""
        if self._marks is None or not self._has_times:
            return None
        called: dict[str, float] = {}
        for name, start, end in self._marks:
            called[name] = called.get(name, 0.0) + self._streams.milliseconds(start, end) * 1e-3
        seconds: dict[str, float] = {}
        for name in reversed(self._modules):  # those inside come first
            inside = sum(value for other, value in seconds.items() if other and other.rpartition(".")[0] == name)
            seconds[name] = called.get(name, inside)
        return seconds

    @contextmanager
    def _counting(self) -> Iterator[None]:
        counter = _ForwardCounter(self._modules)
        with counter:
            yield
        self._flops = counter.by_module

    @contextmanager
    def _timing(self) -> Iterator[None]:
        marks: list[_Mark] = []
        with ExitStack() as stack:
            for name, module in self._modules.items():
                if not takes_hooks(module):
                    continue
                begun: list[Any] = []
                hooks = [
                    module.register_forward_pre_hook(_begin(begun, self._streams.mark), prepend=True),
                    module.register_forward_hook(_end(name, begun, marks, self._streams.mark), always_call=True),
                ]
                for hook in hooks:
                    stack.callback(hook.remove)
            yield
        self._marks = marks


class _ForwardCounter(FlopCounter):  # type: ignore[no-untyped-call]
    """Leaves out what autograd runs: backwards, and forwards that they compute again."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if in_backward():
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def in_backward() -> bool:
    """Whether this thread computes in a backward."""
    return torch._C._current_graph_task_id() != -1


def _begin(begun: list[Any], mark: Callable[[], Any]) -> Callable[..., None]:
    return lambda module, args: begun.append(None if in_backward() else mark())


def _end(name: str, begun: list[Any], marks: list[_Mark], mark: Callable[[], Any]) -> Callable[..., None]:
    def end(module: nn.Module, args: Any, outputs: Any) -> None:
        start = begun.pop()
        if start is not None:
            marks.append((name, start, mark()))

    return end
