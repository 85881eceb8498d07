"""Where tensors are in safetensors files: names and sizes of files, headers, byte offsets. Pure, and without torch.

The format: https://github.com/huggingface/safetensors#format. Names of files and the index are Hugging Face's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.strict_json import parse_json, shown

# Bytes per element. The format has types of 4 and 6 bits too, whose elements have no address.
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}
LENGTH_BYTES = 8
# A rank reads whole chunks, for their digests: small ones are better for it, and many of them worse for the manifest.
MIN_CHUNK_BYTES = 2**20
MAX_CHUNK_BYTES = 64 * 2**20
CHUNKS = 2**16  # that a manifest should have at most
# The limit of the safetensors library, which opens nothing beyond.
MAX_HEADER_BYTES = 100_000_000
METADATA = "__metadata__"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is to be written. `dtype` is a name of the format ("F32")."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the values.

        Raises:
            ValueError: a dtype that files cannot have, a negative size, or more than 2**63 bytes; names the tensor.
        """
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"'{self.name}' is {self.dtype}: safetensors files have {', '.join(DTYPE_BYTES)}")
        nbytes = _nbytes(self.dtype, self.shape)
        if nbytes is None:
            raise ValueError(f"'{self.name}' has shape {self.shape}, which no file can hold")
        return nbytes


@dataclass(frozen=True)
class FileLayout:
    """A safetensors file before it is written.

    header: the first bytes of the file, 8 bytes of length and the JSON, a multiple of 8. begin: name -> offset of the
    tensor's first byte from the file's start, in the order of the bytes. size: of the file, in bytes.
    """

    name: str
    header: bytes
    begin: dict[str, int]
    size: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. `begin` counts bytes from the file's start."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


def chunk_bytes(files: Sequence[FileLayout]) -> int:
    """Up to which size chunks of these files are written: a power of two."""
    total = sum(file.size for file in files)
    size = MIN_CHUNK_BYTES
    while size < MAX_CHUNK_BYTES and size * CHUNKS < total:
        size *= 2
    return size


def lay_out(
    stem: str, tensors: Sequence[TensorSpec], max_bytes: int = 5_000_000_000, apart: Collection[str] = ()
) -> list[FileLayout]:
    """The files STEM.safetensors, or STEM-00001-of-0000K.safetensors and so on, that hold these tensors in this order.

    A file has at most `max_bytes` of tensors. A tensor that is larger has a file of its own. There is always at least
    one file.

    Args:
        apart: names of tensors that share no file with others, and come first.

    Raises:
        ValueError: two tensors of one name, a name or dtype that the format does not have, or more tensors than the
            header of a file can describe; names the tensor.
    """
    _check_names(tensors)
    groups: list[list[TensorSpec]] = [[]]
    filled, was_apart = 0, False
    for tensor in sorted(tensors, key=lambda tensor: tensor.name not in apart):
        nbytes, is_apart = tensor.nbytes, tensor.name in apart
        if groups[-1] and (filled + nbytes > max_bytes or is_apart != was_apart):
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled, was_apart = filled + nbytes, is_apart
    if len(groups) == 1:
        return [_file(f"{stem}.safetensors", groups[0])]
    return [_file(f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def index_text(files: Sequence[FileLayout]) -> str | None:
    """The text of STEM.safetensors.index.json, which says in which file each tensor is. None: there is one file."""
    if len(files) == 1:
        return None
    weight_map = {tensor: file.name for file in files for tensor in file.begin}
    total_size = sum(file.size - len(file.header) for file in files)
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def header_nbytes(head: bytes, size: int, file: str) -> int:
    """How many bytes at the start of a file are its header, the 8 of the length included: what `parse_header` needs.

    Args:
        head: at least the first 8 bytes. size: of the whole file, in bytes. file: names the file in the error.

    Raises:
        CheckpointError: the file is too short, or the length is no length of a header of this file.
    """
    if size < LENGTH_BYTES or len(head) < LENGTH_BYTES:
        raise CheckpointError(f"{file}: {min(size, len(head))} bytes are too few for a safetensors file")
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    if length > size - LENGTH_BYTES:
        raise CheckpointError(f"{file}: its header says that it has {length} bytes, but the file has {size}")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file}: its header says that it has {length} bytes: at most {MAX_HEADER_BYTES} are read"
        )
    return LENGTH_BYTES + length


def parse_header(head: bytes, size: int, file: str) -> dict[str, StoredTensor]:
    """The tensors of a file, in the order of their bytes. A header that leaves one byte of the file unclear is refused.

    Args:
        head: the file's first bytes, at least `header_nbytes()` of them. size: of the whole file, in bytes.
        file: its name, for the tensors and the error.

    Raises:
        CheckpointError: anything is not exactly as the format says: the header's length, its JSON (see `parse_json`), a
            tensor's description, or tensors that overlap, leave a hole, or end before or behind the file.
    """
    end_of_header = header_nbytes(head, size, file)
    if len(head) < end_of_header:
        raise CheckpointError(f"{file}: {len(head)} bytes of a header of {end_of_header} are there")
    if head[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{":
        raise CheckpointError(f"{file}: its header does not begin with '{{'")
    entries = parse_json(head[LENGTH_BYTES:end_of_header], f"{file}, header")
    _check_metadata(entries.pop(METADATA, {}), file)
    tensors = [(name, _stored(entry, name, end_of_header, file)) for name, entry in entries.items()]
    tensors.sort(key=lambda item: (item[1].begin, item[1].nbytes))
    end = end_of_header
    for name, tensor in tensors:
        if tensor.begin != end:
            kind = "overlaps with the tensor before it" if tensor.begin < end else "leaves a hole before it"
            raise CheckpointError(f"{file}: {shown(name)} begins at byte {tensor.begin}, not {end}: it {kind}")
        end += tensor.nbytes
    if end != size:
        raise CheckpointError(f"{file}: its tensors end at byte {end}, but the file has {size} bytes")
    return dict(tensors)


def _nbytes(dtype: str, shape: Sequence[int]) -> int | None:
    """Size of a tensor; None: not one that there can be. As the format's library does, dimensions are multiplied from
    the left, and no product may leave 63 bits."""
    numel = 1
    for length in shape:
        if type(length) is not int or not 0 <= length < 2**63:
            return None
        numel *= length
        if numel >= 2**63:
            return None
    nbytes = numel * DTYPE_BYTES[dtype]
    return nbytes if nbytes < 2**63 else None


def _check_names(tensors: Sequence[TensorSpec]) -> None:
    twice = [name for name, count in Counter(tensor.name for tensor in tensors).items() if count > 1]
    if twice:
        raise ValueError(f"there are two tensors of the name '{twice[0]}': a file has one of each name")
    for tensor in tensors:
        try:
            tensor.name.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"{tensor.name!r} is no name for a tensor in a file: it is not Unicode") from None
        if tensor.name == METADATA:
            raise ValueError(
                f"'{METADATA}' is no name for a tensor in a file: the format uses it. Rename the parameter"
            )


def _file(name: str, tensors: Sequence[TensorSpec]) -> FileLayout:
    entries: dict[str, Any] = {METADATA: {"format": "pt"}}
    relative = {}
    end = 0
    for tensor in tensors:
        relative[tensor.name] = end
        end += tensor.nbytes
        offsets = [relative[tensor.name], end]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"{name}: {len(tensors)} tensors are too many for one file; write smaller files")
    header = len(text).to_bytes(LENGTH_BYTES, "little") + text
    begin = {name: len(header) + offset for name, offset in relative.items()}
    return FileLayout(name=name, header=header, begin=begin, size=len(header) + end)


def _check_metadata(metadata: Any, file: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file}: '{METADATA}' in its header is {shown(metadata)}, not names with texts")


def _stored(entry: Any, name: str, base: int, file: str) -> StoredTensor:
    """The tensor that an entry of the header describes. base: where the tensors begin."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{file}: {shown(name)} needs 'dtype', 'shape' and 'data_offsets', and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{file}: {shown(name)} has the dtype {shown(dtype)}, which Partita cannot read")
    nbytes = _nbytes(dtype, shape) if isinstance(shape, list) else None
    if nbytes is None:
        raise CheckpointError(f"{file}: {shown(name)} has no shape that a tensor can have: {ascii(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        raise CheckpointError(f"{file}: {shown(name)} needs two numbers as 'data_offsets'")
    begin, end = offsets
    if begin < 0 or end - begin != nbytes:
        raise CheckpointError(
            f"{file}: {shown(name)} is at bytes {begin} to {end}, but {dtype} of shape {ascii(shape)[:80]} has {nbytes}"
        )
    return StoredTensor(file=file, dtype=dtype, shape=tuple(shape), begin=base + begin, nbytes=nbytes)
