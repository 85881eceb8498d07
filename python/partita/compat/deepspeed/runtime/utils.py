"""Helpers that programs of DeepSpeed's call: devices, norms, memory, partitions."""

from __future__ import annotations

import math
import os
import random
import resource
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from partita.comm import place_in_job
from partita.compat.deepspeed._absent import absent_names
from partita.pipeline import balanced

_GB = 2**30


def move_to_device(item: Any, device: torch.device | str, criterion_func: Callable[[Any], bool] | None = None) -> Any:
    """The same lists, tuples and dicts with tensors on a device; others stay as they are.

    Args:
        criterion_func: which items move; None: all tensors.
    """
    moves = torch.is_tensor if criterion_func is None else criterion_func
    if moves(item):
        return item.to(device)
    if isinstance(item, list | tuple):
        return type(item)(move_to_device(each, device, criterion_func) for each in item)
    if isinstance(item, dict):
        return {key: move_to_device(each, device, criterion_func) for key, each in item.items()}
    return item


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2, mpu: Any = None
) -> Tensor:
    """torch's; returns the norm. Not for parameters of an engine, which clips by its config's `gradient_clipping`."""
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)


def get_weight_norm(parameters: Tensor | Iterable[Tensor], norm_type: float = 2, mpu: Any = None) -> float:
    """The norm of all parameters together."""
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    return float(torch.nn.utils.get_total_norm([p.detach().float() for p in given], norm_type))


def get_global_norm(norm_list: Iterable[float]) -> float:
    """The 2-norm of what has these norms; infinite if one is not finite or negative."""
    norms = [float(norm) for norm in norm_list]
    return math.hypot(*norms) if all(0 <= norm < math.inf for norm in norms) else math.inf


def get_global_norm_of_tensors(input_tensors: Iterable[Tensor], norm_type: float = 2, mpu: Any = None) -> Tensor:
    """The norm of tensors together."""
    return torch.nn.utils.get_total_norm([tensor.detach().float() for tensor in input_tensors], norm_type)


def see_memory_usage(message: str, force: bool = False) -> None:
    """Rank 0 prints the message, the memory of its GPU and the largest that the process had on the host.

    Args:
        force: False: nothing is printed.
    """
    if not force or place_in_job()[0]:
        return
    print(message)
    if torch.cuda.is_available():
        now, most = torch.cuda.memory_allocated() / _GB, torch.cuda.max_memory_allocated() / _GB
        held, most_held = torch.cuda.memory_reserved() / _GB, torch.cuda.max_memory_reserved() / _GB
        print(f"MA {now:.2f} GB  Max_MA {most:.2f} GB  CA {held:.2f} GB  Max_CA {most_held:.2f} GB")
        torch.cuda.reset_peak_memory_stats()
    peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"CPU memory of the process: at most {peak_kb / 2**20:.2f} GB")


def empty_cache() -> None:
    """Gives unused memory of the GPU back."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def set_random_seed(seed: int) -> None:
    """Seeds the generators of Python, NumPy and torch."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def ensure_directory_exists(filename: str | os.PathLike[str]) -> None:
    """Makes the folder of a file."""
    Path(filename).parent.mkdir(parents=True, exist_ok=True)


def call_to_str(base: str, *args: Any, **kwargs: Any) -> str:
    """A call in words: `base(1, name=2)`."""
    given = [repr(each) for each in args] + [f"{name}={value!r}" for name, value in kwargs.items()]
    return f"{base}({', '.join(given)})"


def partition_uniform(num_items: int, num_parts: int) -> list[int]:
    """Bounds of `num_parts` runs of about as many items, the larger ones last: run i is from bound i to bound i + 1."""
    size, larger = divmod(num_items, num_parts)
    if not size:
        return [min(part, num_items) for part in range(num_parts + 1)]
    sizes = [size + (part >= num_parts - larger) for part in range(num_parts)]
    return [sum(sizes[:part]) for part in range(num_parts + 1)]


def partition_balanced(weights: Sequence[float], num_parts: int) -> list[int]:
    """Bounds of `num_parts` runs whose largest weight is as small as may be, as `partita.pipeline.balanced` says."""
    return [0, *(run.stop for run in balanced(weights, num_parts))]


def noop_decorator(func: Callable[..., Any]) -> Callable[..., Any]:
    """The function."""
    return func


__getattr__ = absent_names(__name__)
