"""Writing a model's weights into one safetensors file, a tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from partita.comm import Communicator, any_rank, text_by_rank
from partita.device.memory import FreedMemory
from partita.files import file_to_write
from partita.model.weights import state_tensors

# Names of the format: https://github.com/huggingface/safetensors#format
DTYPE_NAMES = {
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class WeightFile:
    """A safetensors file whose tensors are written in any order; it appears under its name when it is complete.

    The library that reads the format writes it from tensors that are all in memory; this holds one at a time.

    Args:
        layout: name -> (dtype, shape) of all tensors.

    Raises:
        ValueError: a dtype that the format does not have; names the tensor.
        OSError: when it is entered: what has this name is no regular file, or the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self._path = self._partial = Path(path)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape) in layout.items():
            if dtype not in DTYPE_NAMES:
                raise ValueError(f"'{name}' is {dtype}, which safetensors does not have")
            begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._layout = dict(layout)
        self._header = len(text).to_bytes(8, "little") + text
        self._begin = {name: len(self._header) + header[name]["data_offsets"][0] for name in layout}
        self._end = len(self._header) + end
        self._left = set(layout)
        self._file: BinaryIO | None = None

    def __enter__(self) -> WeightFile:
        self._path = file_to_write(self._path)
        self._partial = file_to_write(self._path.with_name(f"{self._path.name}.partial"))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._partial.open("wb")
        try:
            self._file.truncate(self._end)
            self._file.write(self._header)
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, name: str, values: Tensor) -> None:
        """Writes a tensor, converted to the dtype that was announced."""
        dtype, shape = self._layout[name]
        if tuple(values.shape) != shape:
            raise ValueError(f"'{name}' has shape {tuple(values.shape)}, not {shape}")
        if self._file is None:
            raise ValueError("the file is not open")
        # A copy, as numpy() ties a storage to its size.
        data = values.detach().to(device="cpu", dtype=dtype, copy=True).contiguous().view(-1).view(torch.uint8)
        self._file.seek(self._begin[name])
        self._file.write(data.numpy().data)
        self._left.discard(name)

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._file is None:
            return
        complete = kind is None and not self._left
        try:
            if complete:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._partial.replace(self._path)
        finally:
            self._discard()
        if kind is None and not complete:
            raise ValueError(f"'{self._path}' was not written: it lacks {sorted(self._left)}")

    def _discard(self) -> None:
        """Closes the file, which is gone unless it has its name."""
        if self._file is not None:
            with suppress(OSError):  # a full disk refuses what is left in the buffer once more
                self._file.close()
        with suppress(OSError):
            self._partial.unlink(missing_ok=True)


def layout_of(state: Iterable[tuple[str, Any]], dtype: torch.dtype | None) -> dict[str, Any]:
    """(dtype, shape) of everything in a state dict; floating-point tensors are `dtype`, or as they are (None).

    Raises:
        ValueError: something is no tensor; names it.
    """
    layout = {}
    for name, value in state:
        if not isinstance(value, Tensor):
            raise ValueError(
                f"'{name}' in the model's state dict is a {type(value).__name__}: only tensors are written"
            )
        converts = dtype is not None and value.is_floating_point()
        layout[name] = (dtype if converts else value.dtype, tuple(value.shape))
    return layout


def save_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    dtype: torch.dtype | None,
    communicator: Communicator,
) -> None:
    """Writes a model's state dict on rank 0; a collective. See `Engine.save_model`."""
    file = WeightFile(path, layout_of(model.state_dict(keep_vars=True).items(), dtype))
    weights = state_tensors(model, masters=dtype is torch.float32)
    problem = write_weights(file if communicator.rank == 0 else None, weights)
    if any_rank(communicator, problem is not None):
        why = text_by_rank(communicator, str(problem or ""))[0]
        raise OSError(f"'{path}' was not written on rank 0: {why}") from None


def write_weights(file: WeightFile | None, weights: Iterable[tuple[str, Any]]) -> Exception | None:
    """Writes all weights; returns what went wrong with the file. Asks for every tensor in any case: asking is a
    collective. `file` None: another rank writes."""
    problem: Exception | None = None
    freed = FreedMemory()
    with ExitStack() as exits:
        try:
            opened = None if file is None else exits.enter_context(file)
        except OSError as error:
            opened, problem = None, error
        for name, values in weights:
            freed.add(getattr(values, "nbytes", 0))
            if opened is None:
                continue
            try:
                opened.write(name, values)
            except OSError as error:
                opened, problem = None, error
        if problem is None:
            try:
                exits.close()
            except OSError as error:
                problem = error
        else:
            exits.pop_all().__exit__(type(problem), problem, None)
    return problem
