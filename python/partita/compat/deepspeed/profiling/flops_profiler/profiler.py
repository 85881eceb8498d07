"""Operations of what runs between two calls, by module; counted as `partita.model.FlopCounter` does it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from partita.compat.deepspeed._absent import absent_attribute, absent_names
from partita.files import file_to_write
from partita.model import FlopCounter, modules_to_watch
from partita.monitor import ModuleCosts, ProfiledStep, inclusive, scaled, summary_text, tree_text

__all__ = ["FlopsProfiler", "get_model_profile"]


class FlopsProfiler:
    """Counts the operations of a model between `start_profile()` and `stop_profile()`.

    Args:
        model: whose modules are told apart; an engine counts as its model.
        ds_engine: without effect.
        recompute_fwd_factor: the part of the forward that backward computes again.
    """

    def __init__(self, model: nn.Module, ds_engine: Any = None, recompute_fwd_factor: float = 0.0) -> None:
        self.model = model
        self._recompute = recompute_fwd_factor
        self._modules = modules_to_watch(model)
        self._counter: FlopCounter | None = None
        self._seconds = 0.0
        self._begun_at = 0.0
        self.started = False

    def __getattr__(self, name: str) -> Any:
        error = AttributeError(f"'FlopsProfiler' object has no attribute '{name}'")
        raise absent_attribute(name, ["deepspeed.profiling.flops_profiler.FlopsProfiler"], error)

    def start_profile(self, ignore_list: Sequence[type[nn.Module]] | None = None) -> None:
        """Counts from here on, anew.

        Raises:
            ValueError: `ignore_list` is given; operations are counted where they run, not by class.
            RuntimeError: counting has begun already.
        """
        if ignore_list:
            raise ValueError("start_profile(ignore_list=...): operations count wherever they run; leave it out")
        if self.started:
            raise RuntimeError("start_profile() was called twice: call stop_profile() before")
        self._counter = FlopCounter(self._modules)
        self._counter.__enter__()
        self._begun_at, self.started = self._now(), True

    def stop_profile(self) -> None:
        """Counts no more; what was counted stays."""
        if self.started and self._counter is not None:
            self._seconds = self._now() - self._begun_at
            self._counter.__exit__(None, None, None)
        self.started = False

    def reset_profile(self) -> None:
        """Forgets what was counted."""
        self.stop_profile()
        self._counter, self._seconds = None, 0.0

    def end_profile(self) -> None:
        """The same; to be called after the last question."""
        self.reset_profile()

    def get_total_flops(self, as_string: bool = False) -> int | str:
        """Operations; a multiplication with its addition is two."""
        return _said(0 if self._counter is None else self._counter.total, "FLOPs", as_string)

    def get_total_macs(self, as_string: bool = False) -> int | str:
        """Multiplications with their additions."""
        return _said(0 if self._counter is None else self._counter.total // 2, "MACs", as_string)

    def get_total_params(self, as_string: bool = False) -> int | str:
        """Elements of the parameters, whole also where they are partitioned."""
        return _said(sum(p.numel() for p in self.model.parameters()), "", as_string)

    def get_total_duration(self, as_string: bool = False) -> float | str:
        """Seconds between start and stop. Counting makes them longer."""
        return f"{self._seconds * 1e3:.2f} ms" if as_string else self._seconds

    def print_model_profile(
        self,
        profile_step: int = 1,
        module_depth: int = -1,
        top_modules: int = 1,
        detailed: bool = True,
        output_file: str | None = None,
    ) -> None:
        """Prints tables of parameters and operations by module, in Partita's form.

        Args:
            profile_step: what the tables are headed with.
            module_depth: of the modules in the detailed table; -1: all.
            top_modules: classes that are named at each depth.
            output_file: where the tables go; None: they are printed.
        """
        counted = {} if self._counter is None else {n: float(v) for n, v in self._counter.by_module.items()}
        flops = inclusive(counted, self._modules)
        rows = [
            ModuleCosts(name, type(module).__name__, sum(p.numel() for p in module.parameters()), flops[name], None)
            for name, module in self._modules.items()
        ]
        text = summary_text(rows, ProfiledStep(profile_step, 1, self._recompute), top_modules)
        if detailed:
            text += "\n\n" + tree_text(rows, module_depth)
        if output_file is None:
            print(text)
        else:
            file_to_write(Path(output_file)).write_text(text + "\n", encoding="utf-8")

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def get_model_profile(
    model: nn.Module,
    input_shape: Sequence[int] | None = None,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    print_profile: bool = True,
    detailed: bool = True,
    module_depth: int = -1,
    top_modules: int = 1,
    warm_up: int = 1,
    as_string: bool = True,
    output_file: str | None = None,
    ignore_modules: Sequence[type[nn.Module]] | None = None,
    mode: str = "forward",
) -> tuple[int | str, int | str, int | str]:
    """(FLOPs, MACs, parameters) of one call of a model, which is in evaluation mode then; strings unless `as_string` is
    false.

    Args:
        input_shape: the model is called with one tensor of this shape, in the dtype of its parameters.
        args, kwargs: what it is called with else.
        warm_up: calls before the one that counts.
        mode: "forward" or "generate".
        others: as for `FlopsProfiler`.

    Raises:
        ValueError: there is nothing to call the model with, or no such mode.
    """
    if mode not in ("forward", "generate"):
        raise ValueError(f"get_model_profile(mode='{mode}'): give 'forward' or 'generate'")
    if input_shape is not None:
        like = next(model.parameters(), torch.empty((), dtype=torch.float32, device="cpu"))
        args = [like.new_ones(tuple(input_shape))]
    if not args and not kwargs:
        raise ValueError("get_model_profile(): give input_shape, args or kwargs")
    model.eval()
    call: Any = model if mode == "forward" else model.generate
    profiler = FlopsProfiler(model)
    for _ in range(warm_up):
        call(*(args or ()), **(kwargs or {}))
    profiler.start_profile(ignore_modules)
    try:
        call(*(args or ()), **(kwargs or {}))
    finally:
        profiler.stop_profile()
    found = (
        profiler.get_total_flops(as_string),
        profiler.get_total_macs(as_string),
        profiler.get_total_params(as_string),
    )
    if print_profile:
        profiler.print_model_profile(warm_up, module_depth, top_modules, detailed, output_file)
    profiler.end_profile()
    return found


def _said(number: int, unit: str, as_string: bool) -> int | str:
    return f"{scaled(number)}{unit}".rstrip() if as_string else number


__getattr__ = absent_names(__name__)
