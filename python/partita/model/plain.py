"""Small states as JSON: what JSON lacks is written as an object with one key, and comes back as it was."""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

MARKS = ("tuple", "items", "counter", "int", "float", "bytes", "tensor")
MAX_DEPTH = 30  # each level of ours may become three of JSON's


def to_plain(value: Any, path: str) -> Any:
    """`value` in JSON types. Subclasses of numbers and strings become what they derive from.

    Args:
        path: where the value is, for the error.

    Raises:
        TypeError: something that is neither a number, a string, bytes, a tensor, nor a list, tuple or dict of such.
        ValueError: lists, tuples and dicts of more than MAX_DEPTH levels.
    """
    return _to_plain(value, path, 0)


def _to_plain(value: Any, path: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError(f"{path} is nested deeper than {MAX_DEPTH} levels, or contains itself: it cannot be saved")
    if isinstance(value, np.generic) and not isinstance(item := value.item(), np.generic):
        value = item
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        number = int(value)
        return number if -(2**63) <= number < 2**63 else {"int": hex(number)}
    if isinstance(value, float):
        real = float(value)
        return real if math.isfinite(real) else {"float": repr(real)}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, Tensor):
        return {"tensor": _plain_tensor(value, path)}
    if isinstance(value, tuple):
        return {"tuple": [_to_plain(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [_to_plain(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        is_object = all(isinstance(key, str) for key in value) and not isinstance(value, Counter)
        if is_object and not (len(value) == 1 and next(iter(value)) in MARKS):
            return {str.__str__(k): _to_plain(item, f"{path}.{k}", depth + 1) for k, item in value.items()}
        mark = "counter" if isinstance(value, Counter) else "items"
        pairs = value.items()
        return {mark: [[_to_plain(k, path, depth + 1), _to_plain(v, f"{path}[{k!r}]", depth + 1)] for k, v in pairs]}
    more = ": give torch.from_numpy(...) of it" if isinstance(value, np.ndarray) else ""
    raise TypeError(
        f"{path} is a {type(value).__name__}: only numbers, strings, bytes, tensors, and lists, tuples and dicts of "
        f"them can be saved{more}"
    )


def _plain_tensor(value: Tensor, path: str) -> dict[str, Any]:
    try:
        flat = value.detach().to(device="cpu", copy=True).resolve_conj().resolve_neg().contiguous().reshape(-1)
        data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise TypeError(f"{path} is a tensor that cannot be saved ({value.layout}, {value.device}): {error}") from None
    return {"dtype": str(value.dtype), "shape": list(value.shape), "data": base64.b64encode(data).decode()}


def from_plain(plain: Any) -> Any:
    """The reverse of `to_plain`."""
    if isinstance(plain, list):
        return [from_plain(item) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if len(plain) == 1:
        (mark, content), *_ = plain.items()
        if mark == "tuple":
            return tuple(from_plain(item) for item in content)
        if mark == "items":
            return {from_plain(key): from_plain(item) for key, item in content}
        if mark == "counter":
            return Counter({from_plain(key): from_plain(item) for key, item in content})
        if mark == "int":
            return int(content, 0)
        if mark == "float":
            return float(content)
        if mark == "bytes":
            return base64.b64decode(content)
        if mark == "tensor":
            dtype = getattr(torch, content["dtype"].removeprefix("torch."))
            tensor = torch.empty(content["shape"], dtype=dtype, device="cpu")
            if tensor.numel():
                raw = torch.frombuffer(bytearray(base64.b64decode(content["data"])), dtype=torch.uint8)
                tensor.copy_(raw.view(dtype).reshape(content["shape"]))
            return tensor
    return {key: from_plain(item) for key, item in plain.items()}
