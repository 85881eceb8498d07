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
INTEGERS = range(-(2**63), 2**63)  # those that every reader of JSON reads


def to_plain(value: Any, path: str) -> Any:
    """`value` in JSON types.

    Args:
        path: where the value is, for the error.

    Raises:
        TypeError: something that is neither a number, a string, bytes, a tensor, nor a list, tuple or dict of such.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return value if value in INTEGERS else {"int": str(value)}
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, np.generic):
        return to_plain(value.item(), path)
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, Tensor):
        flat = value.detach().to(device="cpu", copy=True).contiguous().reshape(-1)
        data = base64.b64encode(flat.view(torch.uint8).numpy().tobytes()).decode()
        return {"tensor": {"dtype": str(value.dtype), "shape": list(value.shape), "data": data}}
    if isinstance(value, tuple):
        return {"tuple": [to_plain(item, f"{path}[{i}]") for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [to_plain(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        is_object = all(isinstance(key, str) for key in value) and not isinstance(value, Counter)
        if is_object and not (len(value) == 1 and next(iter(value)) in MARKS):
            return {key: to_plain(item, f"{path}.{key}") for key, item in value.items()}
        mark = "counter" if isinstance(value, Counter) else "items"
        return {mark: [[to_plain(k, path), to_plain(item, f"{path}[{k!r}]")] for k, item in value.items()]}
    raise TypeError(
        f"{path} is a {type(value).__name__}: only numbers, strings, bytes, tensors, and lists, tuples and dicts of "
        "them can be saved"
    )


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
            return int(content)
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
