"""export.py: files that the safetensors library reads, complete or not there at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from partita.model.export import DTYPE_NAMES, WeightFile, layout_of, write_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


def random_tensor(dtype: torch.dtype, *shape: int) -> Tensor:
    """All bit patterns of floats that are no NaN occur; zeros and ones of booleans."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 100
    return values > 0 if dtype is torch.bool else values.to(dtype)


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    with WeightFile(path, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)


def assert_reads_back(path: Path, tensors: dict[str, Tensor]) -> None:
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype, name
        assert read[name].shape == tensor.shape, name
        assert torch.equal(read[name], tensor), name


MANY = {str(dtype): random_tensor(dtype, 3, 5) for dtype in DTYPE_NAMES}


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (7,), (), (0,), (0, 4), (2, 0, 3), (1, 1, 1, 1)], ids=str)
def test_every_dtype_and_shape_is_read_back(tmp_path, dtype, shape):
    """C5: odd, empty and 0-dimensional tensors, between others."""
    tensors = {"before": torch.ones(3), "it": random_tensor(dtype, *shape), "after": torch.arange(5)}
    write(tmp_path / "a.safetensors", tensors)
    assert_reads_back(tmp_path / "a.safetensors", tensors)


def test_tensors_may_come_in_any_order(tmp_path):
    path, layout = tmp_path / "a", {name: (t.dtype, tuple(t.shape)) for name, t in MANY.items()}
    with WeightFile(path, layout) as file:
        for name in reversed(MANY):
            file.write(name, MANY[name])
    assert_reads_back(path, MANY)


def test_the_file_is_its_header_and_its_content(tmp_path):
    """C7: a view is written without the rest of its storage."""
    large = torch.arange(10_000.0)
    write(
        tmp_path / "a",
        {"view": large[10:13], "strided": large[:12].view(3, 4).t(), "expanded": torch.ones(1).expand(5)},
    )
    raw = (tmp_path / "a").read_bytes()
    header = int.from_bytes(raw[:8], "little")
    assert header % 8 == 0
    assert len(raw) == 8 + header + 4 * (3 + 12 + 5)
    assert json.loads(raw[8 : 8 + header])["__metadata__"] == {"format": "pt"}  # transformers asks for it
    assert_reads_back(
        tmp_path / "a", {"view": large[10:13], "strided": large[:12].view(3, 4).t(), "expanded": torch.ones(5)}
    )


def test_it_reads_as_what_the_library_writes(tmp_path):
    save_file(MANY, tmp_path / "theirs", metadata={"format": "pt"})
    write(tmp_path / "ours", MANY)
    with safe_open(tmp_path / "ours", "pt") as ours, safe_open(tmp_path / "theirs", "pt") as theirs:
        assert set(ours.keys()) == set(theirs.keys())
        assert ours.metadata() == theirs.metadata()
        for name in ours.keys():  # noqa: SIM118 (no mapping)
            assert torch.equal(ours.get_tensor(name), theirs.get_tensor(name))


@pytest.mark.parametrize("name", ["a.b.weight", 'quote"and\\backslash', "größe.重み", "with blank", "x" * 300, "\n"])
def test_any_name_can_be_written(tmp_path, name):
    write(tmp_path / "a", {name: torch.ones(2), "other": torch.zeros(3)})
    assert_reads_back(tmp_path / "a", {name: torch.ones(2), "other": torch.zeros(3)})


def test_values_are_converted_to_the_dtype_that_was_announced(tmp_path):
    values = random_tensor(torch.float32, 7)
    with WeightFile(tmp_path / "a", {"it": (torch.bfloat16, (7,))}) as file:
        file.write("it", values)
    assert_reads_back(tmp_path / "a", {"it": values.bfloat16()})


def test_no_tensors_are_a_file_too(tmp_path):
    write(tmp_path / "a", {})
    assert load_file(tmp_path / "a") == {}


def test_folders_are_made_and_an_older_file_is_replaced(tmp_path):
    path = tmp_path / "new" / "deep" / "a.safetensors"
    write(path, {"a": torch.ones(100)})
    write(path, {"b": torch.zeros(2)})
    assert_reads_back(path, {"b": torch.zeros(2)})
    assert list(path.parent.iterdir()) == [path]


def test_a_written_tensor_can_still_be_resized(tmp_path):
    """numpy() ties a storage to its size; parameters of stage 3 live by resizing theirs."""
    values = torch.ones(4)
    write(tmp_path / "a", {"it": values})
    values.untyped_storage().resize_(0)


# -- not complete: not there


LAYOUT: dict[str, Any] = {"a": (torch.float32, (3,)), "b": (torch.float32, (2,))}


def test_a_tensor_that_was_not_written_is_named_and_there_is_no_file(tmp_path):
    with (
        pytest.raises(ValueError, match=r"was not written: it lacks \['b'\]"),
        WeightFile(tmp_path / "x", LAYOUT) as file,
    ):
        file.write("a", torch.ones(3))
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_the_older_file_and_nothing_else(tmp_path):
    write(tmp_path / "x", {"old": torch.ones(1)})
    with pytest.raises(KeyboardInterrupt), WeightFile(tmp_path / "x", LAYOUT) as file:
        file.write("a", torch.ones(3))
        file.write("b", torch.ones(2))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]
    assert_reads_back(tmp_path / "x", {"old": torch.ones(1)})


class FullDisk:
    """A file whose calls in `fails` find no room."""

    def __init__(self, file: Any, fails: str) -> None:
        self.file, self.fails = file, fails

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def _or_fail(self, name: str, *args: Any) -> Any:
        if name in self.fails.split():
            raise OSError(28, "No space left on device")
        return getattr(self.file, name)(*args)

    def truncate(self, size: int) -> Any:
        return self._or_fail("truncate", size)

    def write(self, data: Any) -> Any:
        return self._or_fail("write", data)

    def flush(self) -> Any:
        return self._or_fail("flush")

    def close(self) -> None:
        self.file.close()
        self._or_fail("close")


@pytest.mark.parametrize("fails", ["truncate", "write", "write close", "flush", "flush close"])
def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path, fails, monkeypatch):
    """C2: wherever the system says so, and whatever it says when the file is closed."""
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode: FullDisk(real(path, mode), fails))
    problem = write_weights(WeightFile(tmp_path / "x", LAYOUT), iter([("a", torch.ones(3)), ("b", torch.ones(2))]))
    monkeypatch.undo()
    assert isinstance(problem, OSError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_errors_at_the_end_leave_nothing(tmp_path, call, monkeypatch):
    """C2: what the system did not bring to the disk has no name."""

    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), fail)
    problem = write_weights(WeightFile(tmp_path / "x", LAYOUT), iter([("a", torch.ones(3)), ("b", torch.ones(2))]))
    assert isinstance(problem, OSError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "shape", "named"), [("a", (4,), "'a' has shape \\(4,\\), not \\(3,\\)")])
def test_another_shape_than_announced_is_refused_by_name(tmp_path, name, shape, named):
    with pytest.raises(ValueError, match=named), WeightFile(tmp_path / "x", LAYOUT) as file:
        file.write(name, torch.ones(shape))
    assert list(tmp_path.iterdir()) == []


def test_the_file_exists_only_inside_of_the_block(tmp_path):
    with pytest.raises(ValueError, match="not open"):
        WeightFile(tmp_path / "x", LAYOUT).write("a", torch.ones(3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.complex128, torch.float8_e4m3fnuz], ids=str)
def test_a_dtype_that_the_format_lacks_is_refused_by_name(tmp_path, dtype):
    with pytest.raises(ValueError, match=f"'odd.weight' is {dtype}"):
        WeightFile(tmp_path / "x", {"odd.weight": (dtype, (2,))})


# -- all weights of a model


def test_the_layout_converts_floating_point_only():
    state = {"w": torch.ones(2, 3), "steps": torch.tensor(3), "mask": torch.ones(2, dtype=torch.bool)}
    assert layout_of(state.items(), None) == {
        "w": (torch.float32, (2, 3)),
        "steps": (torch.int64, ()),
        "mask": (torch.bool, (2,)),
    }
    assert layout_of(state.items(), torch.float16)["w"] == (torch.float16, (2, 3))
    assert layout_of(state.items(), torch.float16)["steps"] == (torch.int64, ())


def test_what_is_no_tensor_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'block\._extra_state' in the model's state dict is a dict"):
        layout_of([("w", torch.ones(1)), ("block._extra_state", {})], None)


class Failing(WeightFile):
    """A disk that fails at a chosen place."""

    def __init__(self, path: Path, at: str) -> None:
        super().__init__(path, LAYOUT)
        self.at = at

    def __enter__(self) -> WeightFile:
        if self.at == "open":
            raise OSError(13, "refused")
        return super().__enter__()

    def write(self, name: str, values: Tensor) -> None:
        super().write(name, values)
        if self.at == name:
            raise OSError(28, "no space left")

    def __exit__(self, kind: Any, *error: Any) -> None:
        super().__exit__(kind if self.at != "close" else OSError, *error)
        if self.at == "close":
            raise OSError(5, "lost")


@pytest.mark.parametrize("at", ["open", "a", "b", "close"])
def test_all_weights_are_asked_for_whatever_becomes_of_the_file(tmp_path, at):
    """Asking is a collective: a rank that stops would leave the others waiting."""
    asked = []

    def weights() -> Any:
        for name, (_, shape) in LAYOUT.items():
            asked.append(name)
            yield name, torch.ones(shape)

    problem = write_weights(Failing(tmp_path / "x", at), weights())
    assert isinstance(problem, OSError)
    assert asked == ["a", "b"]
    assert list(tmp_path.iterdir()) == []


def test_without_a_file_nothing_is_written_and_all_is_asked_for(tmp_path):
    asked = iter([("a", torch.ones(3)), ("b", torch.ones(2))])
    assert write_weights(None, asked) is None
    assert list(asked) == []
    assert write_weights(WeightFile(tmp_path / "x", LAYOUT), iter([("a", torch.ones(3)), ("b", torch.ones(2))])) is None
    assert_reads_back(tmp_path / "x", {"a": torch.ones(3), "b": torch.ones(2)})
