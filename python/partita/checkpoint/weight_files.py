"""Files that a program gives as weights: one, several, a folder with or without an index, or a checkpoint."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.folder import manifest_in, opened_folder
from partita.checkpoint.layout import LENGTH_BYTES, MIN_CHUNK_BYTES, header_nbytes, parse_header
from partita.checkpoint.manifest import FORMAT, MANIFEST, plain_name
from partita.checkpoint.places import MODEL, Place
from partita.checkpoint.reads import Chunk
from partita.checkpoint.stored import Stored
from partita.checkpoint.strict_json import parse_json
from partita.checkpoint.tags import LATEST
from partita.checkpoint.tensor_files import TensorFiles

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
INDEX_SUFFIX = ".safetensors.index.json"

WeightPaths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


class WeightFiles(TensorFiles):
    """The tensors of safetensors files, whoever wrote them. Of two of one name, the later file's counts.

    Raises:
        OSError: a file cannot be opened.
        ValueError: a file is a pickle, which is never opened; names it.
        CheckpointError: a file is damaged, or no safetensors file.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__()
        with ExitStack() as undo:
            undo.callback(self._exits.close)
            for path in paths:
                self._open(path)
            undo.pop_all()

    def _open(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for a writer
        self._exits.callback(os.close, fd)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"'{path}' is not a regular file")
        head = os.pread(fd, LENGTH_BYTES, 0)
        if _is_pickle(head):
            raise ValueError(_why_no_pickle(path))
        name = str(path)
        head = os.pread(fd, header_nbytes(head, status.st_size, name), 0)
        self.tensors.update(
            (Place(MODEL, tensor), stored) for tensor, stored in parse_header(head, status.st_size, name).items()
        )
        self._fds[name] = fd

    def _chunks(self, place: Place, begin: int, end: int) -> Iterator[tuple[int, Chunk]]:
        name = self.tensors[place].file
        for number, offset in enumerate(range(begin, end, MIN_CHUNK_BYTES)):
            nbytes = min(MIN_CHUNK_BYTES, end - offset)
            yield number, Chunk(self._fds[name], offset, nbytes, None, f"'{place.name}' in '{name}'")


def open_weights(source: WeightPaths) -> TensorFiles:
    """The tensors of a model; their place is (MODEL, name).

    Args:
        source: a safetensors file, several, or a folder. Of a folder with an index (NAME.safetensors.index.json, one or
            `model`'s) the files that the index names count, else all *.safetensors. Of a checkpoint of Partita's, the
            model's files count, with the digests that its manifest has.

    Raises:
        OSError: a file cannot be opened.
        ValueError: a file is a pickle, a folder has no weights, or a checkpoint is encrypted; says what to do.
        CheckpointError: a file is damaged, or is not what an index or a manifest says.
    """
    paths = [Path(source)] if isinstance(source, str | os.PathLike) else [Path(path) for path in source]
    if len(paths) != 1 or not paths[0].is_dir():
        return WeightFiles(paths)
    folder = paths[0]
    if (folder / MANIFEST).is_file() and FORMAT.encode() in (folder / MANIFEST).read_bytes():
        return _of_checkpoint(folder.resolve())
    index = _index_of(folder)
    if index is None:
        return WeightFiles(_all_files(folder))
    weight_map = _weight_map(index)
    files = WeightFiles([folder / name for name in sorted(set(weight_map.values()))])
    for name, file in weight_map.items():
        there = files.tensors.get(Place(MODEL, name))
        if there is None or there.file != str(folder / file):
            with files:
                raise CheckpointError(f"'{index}' says that '{name}' is in '{file}', and it is not")
    return files


def _of_checkpoint(folder: Path) -> Stored:
    with opened_folder(folder) as fd:
        manifest = manifest_in(fd, folder)
    if any(record.seals is not None for record in manifest.files.values()):
        raise ValueError(
            f"'{folder}' is encrypted: engine.load_checkpoint(..., load_module_only=True) opens it with the config's "
            "key, and `partita checkpoint export` writes its weights as they are"
        )
    return Stored(folder, manifest, stem=MODEL)


def _index_of(folder: Path) -> Path | None:
    of_model = folder / f"{MODEL}{INDEX_SUFFIX}"
    found = [of_model] if of_model.is_file() else sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    return found[0] if len(found) == 1 else None


def _weight_map(index: Path) -> Mapping[str, str]:
    """The file of each tensor."""
    content = parse_json(index.read_bytes(), f"'{index}'")
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"'{index}' has no 'weight_map' from tensors to files")
    try:
        return {name: plain_name(file) for name, file in weight_map.items()}
    except ValueError as error:
        raise CheckpointError(f"'{index}': {error}") from None


def _all_files(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
        why = f"; {_why_no_pickle(pickles[0])}" if pickles else ""
        if (folder / LATEST).is_file():
            why = f": it has checkpoints, give one of them, such as '{folder / (folder / LATEST).read_text()}'"
        raise ValueError(f"there is no *.safetensors file in '{folder}'{why}")
    return paths


def _is_pickle(head: bytes) -> bool:
    """Whether this is what torch.save() writes (a zip archive; a pickle before torch 1.6), whatever it is called."""
    return head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))


def _why_no_pickle(path: Path) -> str:
    return (
        f"'{path}' is a pickle, as torch.save() writes it, and is not opened here: a pickle can run any program. Give "
        f"what torch.load('{path}', map_location='cpu', weights_only=True) returns, or a safetensors file"
    )
