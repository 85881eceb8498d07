"""The large files of a save: made on rank 0, and written by all ranks, each its own runs of bytes."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.layout import FileLayout, chunk_bytes
from partita.checkpoint.manifest import FileRecord
from partita.checkpoint.pieces import Piece
from partita.checkpoint.places import Place, stem_of
from partita.checkpoint.sealing import Cipher
from partita.checkpoint.transfer import Done, HostRoom, Transfer


@dataclass(frozen=True)
class Run:
    """Where a piece is. file: its number. offset: in the file, in bytes."""

    file: int
    offset: int
    piece: Piece


def places_in(file: FileLayout) -> set[Place]:
    """The tensors of a file."""
    return {Place(stem_of(file.name), name) for name in file.begin}


def runs_in(files: Sequence[FileLayout], mine: Iterable[Piece]) -> list[Run]:
    """Where this rank's pieces are."""
    index = {place: i for i, file in enumerate(files) for place in places_in(file)}
    return [
        Run(i := index[piece.place], files[i].begin[piece.place.name] + piece.first * piece.values.itemsize, piece)
        for piece in mine
    ]


class Writer:
    """Writes headers, if `heads`, and this rank's pieces; they are on the disk after `finish()`.

    Args:
        there: names of files that are not written.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[FileLayout],
        there: Collection[str],
        heads: bool,
        room: HostRoom | None,
        cipher: Cipher | None,
    ) -> None:
        def seals(i: int, offset: int, data: memoryview, into: memoryview) -> bytes:
            assert cipher is not None
            return cipher.seal(files[i].name, offset, data, into)

        self._files = files
        with ExitStack() as exits:
            self._fds = {i: _open(folder, file, exits) for i, file in enumerate(files) if file.name not in there}
            self._direct = {i: _open_direct(folder / files[i].name, exits) for i in self._fds}
            self.transfer = exits.enter_context(Transfer(chunk_bytes(files), room, None if cipher is None else seals))
            for i, fd in self._fds.items():
                if heads:
                    self.transfer.write_data(fd, 0, files[i].header, (i, files[i].name))
            self._exits = exits.pop_all()

    def write(self, runs: Iterable[Run]) -> None:
        """Begins to write pieces, which must not change until `finish()`, or `take_over()` of the transfer."""
        for run in runs:
            if run.file in self._fds:
                label = (run.file, f"'{run.piece.place.name}' in {self._files[run.file].name}")
                fd, direct = self._fds[run.file], self._direct[run.file]
                self.transfer.write(fd, run.offset, run.piece.values, label, direct)

    def sync(self) -> None:
        """What was given to `write()` will be on the disk."""
        for i, fd in self._fds.items():
            self.transfer.sync(fd, (i, self._files[i].name))

    def finish(self) -> list[Done]:
        """Waits for everything; where each chunk is, and its digest."""
        with self._exits:
            return self.transfer.finish()

    def close(self) -> None:
        """Drops what is not written."""
        self._exits.close()


def _open(folder: Path, file: FileLayout, exits: ExitStack) -> int:
    try:
        fd = os.open(folder / file.name, os.O_WRONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise CheckpointError(
            f"host {socket.gethostname()} does not see '{folder / file.name}', which rank 0 has made: all ranks must "
            "save into one folder, on a file system that all hosts share"
        ) from None
    exits.callback(os.close, fd)
    return fd


def _open_direct(path: Path, exits: ExitStack) -> int | None:
    """The same past the page cache; None: this file system has only the usual way."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_DIRECT)
    except OSError:
        return None
    exits.callback(os.close, fd)
    return fd


def records_of(files: Sequence[FileLayout], chunks: Iterable[Any], there: Collection[str]) -> dict[str, FileRecord]:
    """The chunks of every file that was written, in the order of their offsets."""
    by_file: list[list[tuple[int, int, str, str]]] = [[] for _ in files]
    for i, *chunk in chunks:
        by_file[i].append(tuple(chunk))
    records = {}
    for file, written in zip(files, by_file, strict=True):
        if file.name in there:
            continue
        end = 0
        for offset, length, *_ in sorted(written):
            if offset != end:
                raise CheckpointError(f"{file.name}: no rank wrote the bytes from {end} on, or two did")
            end += length
        if end != file.size:
            raise CheckpointError(f"{file.name}: no rank wrote the bytes from {end} to {file.size}")
        in_order = [(length, digest) for _, length, digest, _ in sorted(written)]
        seals = [seal for *_, seal in sorted(written)]
        record = FileRecord(size=file.size, chunks=in_order)
        records[file.name] = record if not any(seals) else record.model_copy(update={"seals": seals})
    return records
