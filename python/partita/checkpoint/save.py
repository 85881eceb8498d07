"""Saving: all ranks write their own parts of the same files."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from partita.checkpoint.agreement import from_rank_0, together
from partita.checkpoint.commit import Staging, sweep
from partita.checkpoint.disk import create_file, write_durably
from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.layout import MIN_CHUNK_BYTES, FileLayout, TensorSpec, chunk_bytes, index_text, lay_out
from partita.checkpoint.manifest import FORMAT, MANIFEST, VERSION, FileRecord, Manifest, manifest_text
from partita.checkpoint.pieces import MODEL, OPTIMIZER, Piece, Place, StoredNames, pieces, stem_of
from partita.checkpoint.protection import PLAIN, Protection
from partita.checkpoint.saved_state import STATE, SavedState, parse_state, state_text
from partita.checkpoint.sealing import Cipher
from partita.checkpoint.transfer import COPIED_BYTES, Done, Transfer, digest_text
from partita.comm import Communicator, any_rank, require_same, text_by_rank
from partita.model import DiffersByRank, TrainState, from_plain, to_plain


@dataclass(frozen=True)
class About:
    """What a manifest says about the run.

    facts: for people. is_latest: the checkpoint is the one that is loaded when no tag is given.
    """

    step: int
    samples: int
    facts: dict[str, Any]
    is_latest: bool = True


class Save:
    """A save that is under way: its files are being written.

    The training state must stay as it is until `finish()`, or until `take_over()`.

    Args:
        state: all ranks write it, each its own part of every tensor, straight from where it is.
        client_state: the program's own; rank 0's is saved.
        copied_bytes: of what a device has, copies on the host, at most; None: as many as there are to be.
        then: called on rank 0 once the checkpoint is there.
        protection: who may read it, and the key with which it is encrypted.

    Raises:
        RuntimeError: in the midst of a step.
        TypeError, ValueError: a state has something that cannot be saved; names it. The ranks were not given the same.
        CheckpointError: the checkpoint was not written, for the reason that it gives; on all ranks. What was there
            before is still there.
    """

    def __init__(
        self,
        state: TrainState,
        directory: Path,
        tag: str,
        about: About,
        client_state: Mapping[str, Any],
        *,
        copied_bytes: int | None = COPIED_BYTES,
        then: Callable[[], object] = lambda: None,
        protection: Protection = PLAIN,
    ) -> None:
        world = self._world = state.world
        _require_same(world, directory, tag, about, protection)
        sections = state.take_sections()
        self.path = directory / tag
        self._what = what = f"the checkpoint '{self.path}' was not saved"
        client = together(world, what, lambda: _plain_client_state(client_state))
        names = together(world, what, lambda: StoredNames(state))
        mine = together(world, what, lambda: list(pieces(state, names)))
        self._files = together(world, what, partial(_lay_out, _all_specs(world, mine, names)))
        self._staging = together(world, what, lambda: Staging(directory, tag, protection.access))  # rank 0's
        self._differing = {s.name: sections.pop(s.name) for s in state.sections if isinstance(s.owner, DiffersByRank)}
        self._small = SavedState(
            sections=sections, ranks=[], client_state=client, aliases=names.aliases, parameters=names.renamed
        )
        self._about, self._then, self._protection = about, then, protection
        envelope = from_rank_0(world, what, protection.new_envelope)
        self._cipher = together(world, what, partial(protection.cipher_in, envelope))
        self._committing: Future[str] | None = None
        self._spoiled = ""
        try:
            folder = Path(from_rank_0(world, what, partial(_begin, self._staging, directory, self._files, protection)))
            writer = partial(_Writer, folder, self._files, mine, world.rank == 0, copied_bytes, self._cipher)
            self._writer = together(world, what, writer)
        except BaseException:
            self._staging.discard()
            raise

    def take_over(self) -> int:
        """The training state may change from now on: what is not written yet has been copied. Returns the bytes of it.
        No collective."""
        return self._writer.transfer.take_over()

    def spoil(self, why: str) -> None:
        """The files may have anything by now, so the save fails once all ranks are done. No collective."""
        self._spoiled = why

    def is_written(self) -> bool:
        """Whether nothing of the training state, nor of a copy of it, is still to be written. No collective."""
        return self._writer.transfer.is_done()

    def advance(self) -> bool:
        """Does what can be done without waiting for a disk; whether the checkpoint is there. A collective.

        Raises:
            CheckpointError: it was not written, as in the constructor. The save is over.
        """
        is_ready = self.is_written() if self._committing is None else self._committing.done()
        if any_rank(self._world, not is_ready):
            return False
        if self._committing is not None:
            self.finish()
            return True
        with self._ended_by_errors():
            commit = self._gather()
        threads = ThreadPoolExecutor(1)
        self._committing = threads.submit(commit if self._world.rank == 0 else str)
        threads.shutdown(wait=False)
        return False

    def finish(self) -> Path:
        """Waits until the checkpoint is there; returns its path. A collective.

        Raises:
            CheckpointError: it was not written, as in the constructor. The save is over.
        """
        with self._ended_by_errors():
            commit = self._gather() if self._committing is None else self._committing.result
            from_rank_0(self._world, self._what, commit)
        return self.path

    def abandon(self) -> None:
        """Ends the save; nothing of it is left but a checkpoint that is complete. No collective."""
        self._writer.close()
        if self._committing is not None:
            wait([self._committing])
        self._staging.discard()

    @contextmanager
    def _ended_by_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.abandon()
            raise

    def _gather(self) -> Callable[[], str]:
        """Waits until everything is written; what rank 0 has to do then."""
        chunks = together(self._world, self._what, self._written)
        by_rank = [json.loads(text) for text in text_by_rank(self._world, json.dumps([self._differing, chunks]))]
        return partial(self._commit, by_rank)

    def _written(self) -> list[Done]:
        chunks = self._writer.finish()
        if self._spoiled:
            raise CheckpointError(self._spoiled)
        return chunks

    def _commit(self, by_rank: Sequence[tuple[dict[str, Any], list[Any]]]) -> str:
        small = self._small.model_copy(update={"ranks": [one for one, _ in by_rank]})
        records = _records(self._files, [tuple(chunk) for _, written in by_rank for chunk in written])
        texts = _small_files(small, self._files)
        records |= {name: self._write_small(name, text.encode()) for name, text in texts.items()}
        manifest = _manifest(self.path.name, self._about, self._world.world_size, records)
        path = self._publish(manifest)
        self._then()
        return path

    def _write_small(self, name: str, data: bytes) -> FileRecord:
        """Writes a file as rank 0 alone does."""
        record = _record_of(data)
        if self._cipher is not None:
            data, record = _sealed(self._cipher, name, data, record)
        write_durably(self._staging.path / name, data, self._protection.access.file)
        return record

    def _publish(self, manifest: Manifest) -> str:
        """Writes the manifest, which is the last; returns the path of the checkpoint, which there is now."""
        directory, tag = self.path.parent, self.path.name
        manifest = self._protection.sealed(directory, manifest, self._cipher)
        with self._protection.telling(directory, tag, self._cipher):
            write_durably(self._staging.path / MANIFEST, manifest_text(manifest).encode(), self._protection.access.file)
            return str(self._staging.publish(self._about.is_latest))


def _require_same(world: Communicator, directory: Path, tag: str, about: About, protection: Protection) -> None:
    """All ranks save the same in the same way."""
    given = {
        "save_dir": str(directory),
        "tag": tag,
        "save_latest": str(about.is_latest),
        "checkpoint.encryption": "off" if protection.key is None else "on",
    }
    require_same(world, list(given.items()))


def _plain_client_state(client_state: Mapping[str, Any]) -> Any:
    if not isinstance(client_state, Mapping):
        raise TypeError(f"client_state is a {type(client_state).__name__}: give a dict")
    plain = to_plain(dict(client_state), "client_state")
    from_plain(plain)  # what could not be loaded is refused now
    return plain


def _begin(staging: Staging, directory: Path, files: Sequence[FileLayout], protection: Protection) -> str:
    """On rank 0: makes the folder and its large files; returns the folder's path."""
    sweep(directory)
    staging.create()
    for file in files:
        _preallocate(staging.path / file.name, file.size, protection.access.file)
    return str(staging.path)


def _small_files(small: SavedState, files: Sequence[FileLayout]) -> dict[str, str]:
    """The texts of what is not tensors."""
    texts = {STATE: state_text(small)}
    parse_state(texts[STATE].encode(), STATE)  # what could not be loaded is refused now
    for stem in (MODEL, OPTIMIZER):
        index = index_text([file for file in files if stem_of(file.name) == stem])
        if index is not None:
            texts[f"{stem}.safetensors.index.json"] = index
    return texts


def _manifest(tag: str, about: About, world_size: int, files: dict[str, FileRecord]) -> Manifest:
    # One of encrypted files is looked at when it is complete: `Protection.sealed`.
    make = Manifest.model_construct if any(record.seals is not None for record in files.values()) else Manifest
    return make(
        format=FORMAT,
        version=VERSION,
        tag=tag,
        step=about.step,
        samples=about.samples,
        world_size=world_size,
        created=datetime.now(timezone.utc).isoformat(timespec="microseconds"),
        engine=about.facts,
        files=files,
    )


def _all_specs(world: Communicator, mine: Sequence[Piece], names: StoredNames) -> dict[str, list[TensorSpec]]:
    """Every tensor of the checkpoint by stem, the same on all ranks. What an optimizer keeps for a parameter, only the
    ranks know that have a part of the parameter."""
    specs = dict(names.specs)
    own = {piece.place: piece.spec for piece in mine if piece.place not in specs}
    for text in text_by_rank(world, json.dumps([(spec.name, spec.dtype, spec.shape) for spec in own.values()])):
        for name, dtype, shape in json.loads(text):
            specs.setdefault(Place(OPTIMIZER, name), TensorSpec(name, dtype, tuple(shape)))
    return {stem: [spec for place, spec in specs.items() if place.stem == stem] for stem in (MODEL, OPTIMIZER)}


def _lay_out(specs: Mapping[str, list[TensorSpec]]) -> list[FileLayout]:
    return [file for stem, tensors in specs.items() for file in lay_out(stem, tensors)]


def _preallocate(path: Path, size: int, mode: int) -> None:
    """A new file of this size, whose bytes have their place on the disk."""
    fd = create_file(path, mode)
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        why = f"{os.strerror(error.errno or 0)} (there is no room for {size:,} bytes)"
        raise OSError(error.errno, why, str(path)) from None
    finally:
        os.close(fd)


class _Writer:
    """Writes this rank's pieces, and the headers if `heads`; they are on the disk after `finish()`."""

    def __init__(
        self,
        folder: Path,
        files: Sequence[FileLayout],
        mine: Sequence[Piece],
        heads: bool,
        copied_bytes: int | None,
        cipher: Cipher | None,
    ) -> None:
        def seals(i: int, offset: int, data: memoryview, into: memoryview) -> bytes:
            assert cipher is not None
            return cipher.seal(files[i].name, offset, data, into)

        index = {Place(stem_of(file.name), name): i for i, file in enumerate(files) for name in file.begin}
        with ExitStack() as exits:
            fds = [_open(folder, file, exits) for file in files]
            self.transfer = transfer = exits.enter_context(
                Transfer(chunk_bytes(files), copied_bytes, None if cipher is None else seals)
            )
            for i, file in enumerate(files):
                if heads:
                    transfer.write_data(fds[i], 0, file.header, (i, file.name))
            for piece in mine:
                i = index[piece.place]
                begin = files[i].begin[piece.place.name] + piece.first * piece.values.element_size()
                transfer.write(fds[i], begin, piece.values, (i, f"'{piece.place.name}' in {files[i].name}"))
            for i, fd in enumerate(fds):
                transfer.sync(fd, (i, files[i].name))
            self._exits = exits.pop_all()

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


def _records(files: Sequence[FileLayout], chunks: Iterable[Any]) -> dict[str, FileRecord]:
    """The chunks of every file, in the order of their offsets."""
    by_file: list[list[tuple[int, int, str, str]]] = [[] for _ in files]
    for i, *chunk in chunks:
        by_file[i].append(tuple(chunk))
    records = {}
    for file, written in zip(files, by_file, strict=True):
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


def _record_of(data: bytes) -> FileRecord:
    parts = [data[begin : begin + MIN_CHUNK_BYTES] for begin in range(0, len(data), MIN_CHUNK_BYTES)]
    return FileRecord(size=len(data), chunks=[(len(part), digest_text(part)) for part in parts])


def _sealed(cipher: Cipher, name: str, data: bytes, record: FileRecord) -> tuple[bytes, FileRecord]:
    """A small file as it is encrypted, in the same chunks."""
    parts, seals, begin = [], [], 0
    for length, _ in record.chunks:
        part, seal = cipher.seal_bytes(name, begin, data[begin : begin + length])
        parts.append(part)
        seals.append(seal.hex())
        begin += length
    chunks = [(len(part), digest_text(part)) for part in parts]
    return b"".join(parts), FileRecord(size=record.size, chunks=chunks, seals=seals)
