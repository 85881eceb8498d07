"""What to do about an error of torch that says no more than that two types differ."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# In the messages of torch's kernels.
_SPEAKS_OF_TYPES = re.compile(r"dtype|scalar type|Input type|c10::|BFloat16|Half")


def explain_dtypes(error: RuntimeError, model: nn.Module, inputs: Any) -> None:
    """Adds a note to an error about types: which input, or which buffer, has another type than the parameters.

    Args:
        error: raised by a forward of `model`.
        inputs: its arguments, nested.
    """
    if not _SPEAKS_OF_TYPES.search(str(error)):
        return
    compute = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if compute not in (torch.float16, torch.bfloat16):
        return
    section = "fp16" if compute is torch.float16 else "bf16"
    for note in (*_inputs(inputs, compute, section), *_buffers(model, compute, section)):
        _add_note(error, f"partita: {note}")


def _inputs(inputs: Any, compute: torch.dtype, section: str) -> Iterator[str]:
    for path, leaf in pytree.tree_flatten_with_path(inputs)[0]:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype is not compute:
            where = pytree.keystr(path[1:])
            yield (
                f"the input {where} is {leaf.dtype} and the parameters are {compute} ({section}.enabled): convert it, "
                f"by .to({compute}), or use torch_autocast in place of {section}"
            )
            return


def _buffers(model: nn.Module, compute: torch.dtype, section: str) -> Iterator[str]:
    for name, module in model.named_modules():
        parameter = next((p for p in module.parameters(recurse=False) if p.dtype is compute), None)
        buffer = next((n for n, b in module.named_buffers(recurse=False) if _differs(b, compute)), None)
        if parameter is not None and buffer is not None:
            yield (
                f"the buffer '{name + '.' if name else ''}{buffer}' of a {type(module).__name__} is not {compute}, as "
                f'its parameters are: "data_types": {{"buffer_dtype": "{section}"}} in the config converts buffers too'
            )
            return


def _differs(buffer: Tensor, compute: torch.dtype) -> bool:
    return buffer.is_floating_point() and buffer.dtype is not compute


def _add_note(error: RuntimeError, note: str) -> None:
    """Shown below the message; before Python 3.11 a part of the message."""
    add = getattr(error, "add_note", None)
    if add is not None:
        add(note)
    else:
        error.args = (f"{error}\n{note}",)
