"""Weights as safetensors files of their own, which all ranks write together."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from torch import Tensor

from partita.checkpoint.agreement import from_rank_0, together
from partita.checkpoint.claim import Claim, new_claim
from partita.checkpoint.commit import sweep
from partita.checkpoint.disk import kind_of, make_folders, preallocate, sync_folder, try_remove, write_durably
from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.layout import FileLayout, TensorSpec, chunk_bytes, index_text, lay_out
from partita.checkpoint.manifest import MANIFEST, parse_manifest
from partita.checkpoint.model_weights import ModelWeights
from partita.checkpoint.tags import partial_name
from partita.checkpoint.transfer import COPIED_BYTES, Transfer
from partita.comm import Communicator, require_same
from partita.files import file_to_write

SUFFIX = ".safetensors"
STEM = "model"  # of the files in a folder, as transformers looks for them
INDEX = f"{STEM}{SUFFIX}.index.json"
MAX_BYTES = 5_000_000_000  # of the tensors of one file in a folder
_OWN = re.compile(rf"{STEM}(-\d{{5}}-of-\d{{5}})?\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def save_model_files(weights: ModelWeights, path: Path, world: Communicator, max_bytes: int = MAX_BYTES) -> None:
    """Writes a model's weights, each rank its own part. A collective. See `ModelFiles`.

    Raises:
        ValueError: the ranks were not given the same, or these tensors cannot be in files; names it.
        CheckpointError: the files were not written, for the reason that it gives; on all ranks.
    """
    require_same(world, [("path", str(path)), ("dtype", str(weights.dtype))])
    files = ModelFiles(path, weights.specs, max_bytes)
    what = f"'{path}' was not written"
    try:
        partials = json.loads(from_rank_0(world, what, lambda: json.dumps(files.create())))
        together(world, what, partial(_write, files, partials, weights, world.rank == 0))
        from_rank_0(world, what, files.publish)
    except BaseException:
        files.discard()
        raise


def _write(files: ModelFiles, partials: Sequence[str], weights: ModelWeights, heads: bool) -> None:
    with files.writing(partials, heads=heads) as writing:
        for run in weights.runs():
            for name in run.names:
                writing.put(name, run.first, run.numel, run.read)


class ModelFiles:
    """Safetensors files that have their names when they are complete and on the disk.

    A path that ends in ".safetensors" is one file. Another is a folder with model.safetensors, or with files of at most
    `max_bytes` and an index, as transformers reads them. What else is in the folder stays.

    One process creates, publishes and discards the files. Any process writes into them between `create()` and
    `publish()`.

    [Note: the order of names] An older export is there until the new one is. Of a folder, what transformers opens is
    model.safetensors, and else what the index names. So a new model.safetensors takes its name before an old index
    goes, and a new index before an old model.safetensors goes. Where both exports have an index and the same number of
    files, a crash between the renames, which follow each other at once, leaves files of both.

    Raises:
        ValueError: a name or dtype that files cannot have, or a path that would be that of a pickle; names it.
    """

    def __init__(self, path: Path, tensors: Sequence[TensorSpec], max_bytes: int = MAX_BYTES) -> None:
        if path.suffix in _PICKLES:
            raise ValueError(f"'{path}': pickles are not written; give a name that ends in '{SUFFIX}', or a folder")
        self._path = path
        self._is_file = path.suffix == SUFFIX
        self._layouts: list[FileLayout]
        if self._is_file:
            self._layouts = lay_out(path.stem, tensors, sum(tensor.nbytes for tensor in tensors))
        else:
            self._layouts = lay_out(STEM, tensors, max_bytes)
        self._index = index_text(self._layouts)
        self._places: list[Path] = []
        self._partials: list[Path] = []
        self._claim: Claim | None = None

    def create(self) -> list[str]:
        """Makes the files in their full size, under the hidden names that it returns.

        Raises:
            ValueError: the path is in the folder of a checkpoint.
            OSError: what the system says, or something else has a name that is needed.
        """
        self._places = self._find_places()
        require_outside(self._places[0])
        folder = self._places[0].parent
        make_folders(folder)
        sweep(folder)
        self._claim = new_claim(folder)
        for place in self._places:
            self._partials.append(self._hidden(place.name))
        for hidden, layout in zip(self._partials, self._layouts, strict=False):  # the index comes last
            preallocate(hidden, layout.size)
        return [str(hidden) for hidden in self._partials]

    @contextmanager
    def writing(self, partials: Sequence[str], *, heads: bool) -> Iterator[Writing]:
        """What is written inside is on the disk at the end of the block.

        Args:
            partials: what `create()` has returned.
            heads: headers are written too.

        Raises:
            OSError: a file cannot be written.
        """
        with ExitStack() as exits:
            fds = []
            for hidden, _ in zip(partials, self._layouts, strict=False):
                fds.append(_open(hidden))
                exits.callback(os.close, fds[-1])
            transfer = exits.enter_context(Transfer(chunk_bytes(self._layouts)))
            writing = Writing(self._layouts, fds, transfer)
            if heads:
                for i, layout in enumerate(self._layouts):
                    transfer.write_data(fds[i], 0, layout.header, (i, layout.name))
            yield writing
            for i, layout in enumerate(self._layouts):
                transfer.sync(fds[i], (i, layout.name))
            transfer.finish()

    def publish(self) -> str:
        """Gives the files their names, see [Note: the order of names]; returns the path.

        Raises:
            OSError: what the system says.
        """
        if self._index is not None:
            write_durably(self._partials[-1], self._index.encode())
        for hidden, place in zip(self._partials, self._places, strict=True):
            os.rename(hidden, place)
        folder = self._places[0].parent
        sync_folder(folder)
        if not self._is_file:
            ours = {place.name for place in self._places}
            names = sorted(name for name in os.listdir(folder) if name == INDEX or _OWN.fullmatch(name))
            stale = [name for name in names if name not in ours]
            for name in sorted(stale, key=lambda name: name not in (INDEX, f"{STEM}{SUFFIX}")):
                try_remove(folder / name)
        self._release()
        return str(self._path)

    def discard(self) -> None:
        """Removes what has no name yet. Raises nothing."""
        for hidden in self._partials:
            with suppress(OSError):
                hidden.unlink(missing_ok=True)
        self._release()

    def _find_places(self) -> list[Path]:
        """Of the files, and last of the index if there is one."""
        if self._is_file:
            return [file_to_write(self._path)]
        folder = Path(os.path.realpath(self._path))
        if (kind := kind_of(folder)) not in (None, "a folder"):
            if kind == "a file":
                raise OSError(f"'{self._path}' is a file: give a name that ends in '{SUFFIX}', or a folder")
            file_to_write(folder)  # refuses it
        places = [folder / layout.name for layout in self._layouts]
        places += [] if self._index is None else [folder / INDEX]
        for place in places:
            file_to_write(place)
        return places

    def _hidden(self, name: str) -> Path:
        assert self._claim is not None
        return self._places[0].with_name(partial_name(name, self._claim.token))

    def _release(self) -> None:
        claim, self._claim = self._claim, None
        if claim is not None:
            claim.try_release()


class Writing:
    """Files that are being written by this process."""

    def __init__(self, layouts: Sequence[FileLayout], fds: Sequence[int], transfer: Transfer) -> None:
        self._layouts, self._fds, self._transfer = layouts, fds, transfer
        self._file_of = {name: i for i, layout in enumerate(layouts) for name in layout.begin}
        self._kept_bytes = 0

    def put(self, name: str, first: int, numel: int, read: Callable[[int, int], Tensor]) -> None:
        """Writes elements of a tensor.

        Args:
            first: of them in the flattened tensor.
            numel: how many.
            read: gives a range of them, flat and in the dtype of the file. What it gives stays as it is to the end of
                the block.
        """
        i = self._file_of[name]
        label = (i, f"'{name}' in {self._layouts[i].name}")
        step = COPIED_BYTES // 16
        for begin in range(0, numel, step):
            values = read(begin, min(begin + step, numel))
            at = self._layouts[i].begin[name] + (first + begin) * values.element_size()
            self._transfer.write(self._fds[i], at, values, label)
            self._kept_bytes += values.nbytes
            if self._kept_bytes > COPIED_BYTES:
                self._transfer.finish()
                self._kept_bytes = 0


def require_outside(path: Path) -> None:
    """What is in a checkpoint's folder must stay as it was saved, and goes with the next save of the tag.

    Raises:
        ValueError: the path is in there.
    """
    for folder in Path(os.path.realpath(path)).parents:
        with suppress(CheckpointError, OSError):
            parse_manifest((folder / MANIFEST).read_bytes(), str(folder / MANIFEST))
            raise ValueError(f"'{path}' would be in the checkpoint '{folder}': give a path outside of it")


def _open(hidden: str) -> int:
    try:
        return os.open(hidden, os.O_WRONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise CheckpointError(
            f"'{hidden}', which rank 0 has made, is not seen here: all ranks must write into one folder, on a file "
            "system that all hosts share"
        ) from None
