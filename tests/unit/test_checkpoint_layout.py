"""checkpoint/layout.py: bytes that the safetensors library writes and reads, and Hugging Face's names of files."""

from __future__ import annotations

import ctypes
import json
import re
from pathlib import Path

import pytest
import safetensors
import torch
from huggingface_hub import load_torch_model, split_state_dict_into_shards_factory
from hypothesis import given, settings
from hypothesis import strategies as st
from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.layout import (
    DTYPE_BYTES,
    FileLayout,
    StoredTensor,
    TensorSpec,
    header_nbytes,
    index_text,
    lay_out,
    parse_header,
)
from partita.model import DTYPE_NAMES
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

SHAPES = [(), (0,), (1,), (7,), (3, 5), (0, 4), (2, 0, 3), (1, 1, 1, 1)]


def spec_of(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


def bytes_of(tensor: Tensor) -> bytes:
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.nbytes else b""


def tensors_of_all_kinds() -> dict[str, Tensor]:
    """Every dtype with every shape; the names are not in the order of the tensors."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for dtype in DTYPE_NAMES:
        for shape in SHAPES:
            values = torch.randn(shape, generator=generator) * 100
            found[f"{97 * len(found) % 89}/{dtype}"] = values > 0 if dtype is torch.bool else values.to(dtype)
    return found


def write(folder: Path, files: list[FileLayout], tensors: dict[str, Tensor]) -> None:
    """As a checkpoint is written: files have their size at once, and tensors come in any order."""
    for file in files:
        with (folder / file.name).open("wb") as output:
            output.truncate(file.size)
            for name, begin in reversed(file.begin.items()):
                output.seek(begin)
                output.write(bytes_of(tensors[name]))
            output.seek(0)
            output.write(file.header)
    if text := index_text(files):
        (folder / "model.safetensors.index.json").write_text(text)


def test_the_library_opens_a_file_with_every_dtype_and_shape(tmp_path):
    tensors = tensors_of_all_kinds()
    files = lay_out("model", [spec_of(name, tensor) for name, tensor in tensors.items()])
    assert [file.name for file in files] == ["model.safetensors"]
    assert index_text(files) is None
    write(tmp_path, files, tensors)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert set(opened.keys()) == set(tensors)
        for name, tensor in tensors.items():
            read = opened.get_tensor(name)
            assert read.dtype == tensor.dtype and read.shape == tensor.shape, name
            assert bytes_of(read.clone()) == bytes_of(tensor), name


def test_the_bytes_are_those_that_the_library_writes():
    """The library sorts tensors; given in its order, the file is the same file."""
    tensors = {'a "quoted"\\\n\u007f\u00e9\U0001f600': torch.ones(3), **tensors_of_all_kinds()}
    written = save(tensors, metadata={"format": "pt"})
    order = parse_header(written, len(written), "model.safetensors")
    [file] = lay_out("model", [spec_of(name, tensors[name]) for name in order])
    assert file.header == written[: len(file.header)]
    assert file.size == len(written)
    assert len(file.header) % 8 == 0


def test_headers_of_the_library_are_read():
    tensors = tensors_of_all_kinds()
    written = save(tensors)
    found = parse_header(written, len(written), "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        stored = found[name]
        assert written[stored.begin : stored.begin + stored.nbytes] == bytes_of(tensor)
        spec = spec_of(name, tensor)
        assert (stored.dtype, stored.shape, stored.nbytes) == (spec.dtype, spec.shape, spec.nbytes)


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_the_library_knows_every_dtype_and_its_size(dtype):
    [file] = lay_out("a", [TensorSpec("it", dtype, (3,))])
    [(_, read)] = safetensors.deserialize(file.header + bytes(file.size - len(file.header)))
    assert (read["dtype"], read["shape"], len(read["data"])) == (dtype, [3], 3 * DTYPE_BYTES[dtype])


def test_dtypes_of_torch_have_their_size():
    assert {name: DTYPE_BYTES[name] for name in DTYPE_NAMES.values()} == {
        name: dtype.itemsize for dtype, name in DTYPE_NAMES.items()
    }


NAMED_SIZES = st.lists(st.integers(0, 12), max_size=30).map(
    lambda sizes: [TensorSpec(f"t{i}", "U8", (size,)) for i, size in enumerate(sizes)]
)


@settings(derandomize=True, database=None, deadline=None)
@given(NAMED_SIZES, st.integers(1, 40))
def test_what_is_laid_out_is_read_and_no_byte_is_left(tensors, max_bytes):
    files = lay_out("model", tensors, max_bytes)
    stored: list[tuple[str, StoredTensor]] = []
    for file in files:
        assert header_nbytes(file.header[:8], file.size, file.name) == len(file.header)
        found = parse_header(file.header, file.size, file.name)
        assert {name: tensor.begin for name, tensor in found.items()} == file.begin
        assert file.size - len(file.header) <= max_bytes or len(file.begin) == 1
        stored += found.items()
    assert [TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in stored] == tensors
    assert len(files) == 1 or all(file.begin for file in files)


@settings(derandomize=True, database=None, deadline=None)
@given(NAMED_SIZES.filter(bool), st.integers(12, 40))
def test_files_and_index_are_those_of_hugging_face(tensors, max_bytes):
    """Where no tensor is larger than a file: Hugging Face moves those in front of others."""
    split = split_state_dict_into_shards_factory(
        {tensor.name: tensor for tensor in tensors},
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_bytes,
    )
    files = lay_out("model", tensors, max_bytes)
    assert {file.name: list(file.begin) for file in files} == split.filename_to_tensors
    if split.is_sharded:
        index = json.loads(index_text(files) or "")
        assert index == {"metadata": split.metadata, "weight_map": split.tensor_to_filename}


def test_a_tensor_that_is_too_large_has_a_file_of_its_own():
    sizes = [2, 11, 3, 3, 12, 13, 5, 6]
    files = lay_out("optimizer", [TensorSpec(f"exp_avg/{i}", "U8", (size,)) for i, size in enumerate(sizes)], 10)
    assert [len(file.begin) for file in files] == [1, 1, 2, 1, 1, 1, 1]
    assert [name for file in files for name in file.begin] == [f"exp_avg/{i}" for i in range(8)]
    assert files[1].name == "optimizer-00002-of-00007.safetensors"


def test_hugging_face_loads_many_files(tmp_path):
    """More than nine files: their names are sorted as they are counted."""
    model = nn.Sequential(*[nn.Linear(3, 5 + i % 2) for i in range(7)])
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    files = lay_out("model", [spec_of(name, tensor) for name, tensor in tensors.items()], 50)
    assert len(files) > 11
    assert [file.name for file in files] == sorted(file.name for file in files)
    assert len({len(file.name) for file in files}) == 1
    write(tmp_path, files, tensors)
    other = nn.Sequential(*[nn.Linear(3, 5 + i % 2) for i in range(7)])
    load_torch_model(other, tmp_path, strict=True, safe=True)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in tensors.items())


def test_a_header_may_name_an_empty_tensor_behind_the_one_at_its_place():
    text = json.dumps({"b": entry(0, 3, [3]), "a": entry(0, 0, [0]), "c": entry(3, 3, [0])}).encode()
    head = len(text).to_bytes(8, "little") + text
    assert list(parse_header(head, len(head) + 3, "model.safetensors")) == ["a", "b", "c"]
    assert len(safetensors.deserialize(head + bytes(3))) == 3


def test_no_tensors_are_one_file():
    [file] = lay_out("model", [])
    assert parse_header(file.header, file.size, file.name) == {}
    assert safetensors.deserialize(file.header) == []


def test_large_sizes_are_counted_exactly():
    tensors = [TensorSpec("a", "F64", (2**31, 2**20)), TensorSpec("b", "U8", (1,)), TensorSpec("c", "F32", (2**40,))]
    [file] = lay_out("model", tensors, 2**63)
    assert file.begin["c"] == len(file.header) + 2**54 + 1
    assert parse_header(file.header, file.size, "model")["c"].begin == file.begin["c"]


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ([TensorSpec("a", "F32", (1,)), TensorSpec("a", "F32", (1,))], "two tensors of the name 'a'"),
        ([TensorSpec("__metadata__", "F32", (1,))], "'__metadata__' is no name"),
        ([TensorSpec("a\ud800", "F32", (1,))], r"'a\\ud800' is no name"),
        ([TensorSpec("a", "F4", (2,))], "'a' is F4: safetensors files have BOOL, "),
        ([TensorSpec("a", "float32", (2,))], "'a' is float32"),
        ([TensorSpec("a", "F32", (-1,))], r"'a' has shape \(-1,\)"),
        ([TensorSpec("a", "F32", (2**40, 2**40, 0))], "'a' has shape"),
        ([TensorSpec("a", "F64", (2**61,))], "'a' has shape"),
    ],
)
def test_what_the_format_lacks_is_refused_by_name(tensors, says):
    with pytest.raises(ValueError, match=says):
        lay_out("model", tensors)


def entry(begin: int, end: int, shape: object = (1,), dtype: object = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"a": entry(0, 1), "b": entry(0, 1)}, "'b' begins at byte {base}, not {base+1}: it overlaps"),
        ({"a": entry(0, 1), "b": entry(2, 3)}, "'b' begins at byte {base+2}, not {base+1}: it leaves a hole"),
        ({"a": entry(1, 2)}, "'a' begins at byte {base+1}, not {base}: it leaves a hole"),
        ({"a": entry(0, 1)}, "its tensors end at byte {base+1}, but the file has {base+3} bytes"),
        ({"a": entry(0, 4, [4])}, "its tensors end at byte {base+4}, but the file has {base+3} bytes"),
        ({"a": entry(0, 3, [2])}, "'a' is at bytes 0 to 3, but U8 of shape [2] has 2"),
        ({"a": entry(3, 0, [3])}, "'a' is at bytes 3 to 0"),
        ({"a": entry(-3, 0, [3])}, "'a' is at bytes -3 to 0"),
        ({"a": entry(0, 3, [3.0])}, "'a' has no shape that a tensor can have: [3.0]"),
        ({"a": entry(0, 3, [True, 3])}, "'a' has no shape that a tensor can have"),
        ({"a": entry(0, 3, [-3, -1])}, "'a' has no shape that a tensor can have"),
        ({"a": entry(0, 3, [3], "F31")}, "'a' has the dtype 'F31', which Partita cannot read"),
        ({"a": entry(0, 3, [3], ["U8"])}, "'a' has the dtype a list of 1"),
        ({"a": entry(0, 3, [3]) | {"more": 1}}, "'a' needs 'dtype', 'shape' and 'data_offsets', and nothing else"),
        ({"a": []}, "'a' needs 'dtype'"),
        ({"a": entry(0, 3, [3]) | {"data_offsets": [0]}}, "'a' needs two numbers as 'data_offsets'"),
        ({"a": entry(0, 3, [3]) | {"data_offsets": [0, True]}}, "'a' needs two numbers as 'data_offsets'"),
        ({"a": entry(0, 3, [3]), "__metadata__": {"x": 1}}, "'__metadata__' in its header is a dict of 1"),
    ],
)
def test_a_header_that_leaves_a_byte_unclear_is_refused(entries, says):
    text = json.dumps(entries).encode()
    head = len(text).to_bytes(8, "little") + text
    says = re.sub(r"\{base\+?(\d*)\}", lambda found: str(len(head) + int(found[1] or 0)), says)
    with pytest.raises(CheckpointError) as error:
        parse_header(head, len(head) + 3, "model.safetensors")
    assert str(error.value).startswith(f"model.safetensors: {says}")


def test_sizes_of_a_header_are_looked_at_first():
    """A claim of 2**60 bytes is refused, in a file of this size too."""
    head = (2**60).to_bytes(8, "little")
    with pytest.raises(CheckpointError, match="says that it has 1152921504606846976 bytes, but the file has 9"):
        header_nbytes(head, 9, "a")
    with pytest.raises(CheckpointError, match="at most 100000000 are read"):
        header_nbytes(head, 2**61, "a")
    assert header_nbytes((3).to_bytes(8, "little"), 11, "a") == 11
    with pytest.raises(CheckpointError, match="says that it has 4 bytes, but the file has 11"):
        header_nbytes((4).to_bytes(8, "little"), 11, "a")
