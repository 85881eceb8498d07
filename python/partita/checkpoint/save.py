"""Saving: all ranks write their own parts of the same files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from partita.checkpoint.agreement import from_rank_0, together
from partita.checkpoint.commit import Staging, sweep
from partita.checkpoint.disk import preallocate, write_durably
from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.layout import MIN_CHUNK_BYTES, FileLayout, TensorSpec, chunk_bytes, index_text, lay_out
from partita.checkpoint.manifest import FORMAT, MANIFEST, VERSION, FileRecord, Manifest, manifest_text
from partita.checkpoint.names import StoredNames, stored_names
from partita.checkpoint.pieces import Piece, pieces
from partita.checkpoint.places import MODEL, OPTIMIZER, Place, stem_of
from partita.checkpoint.protection import PLAIN, Protection
from partita.checkpoint.saved_state import STATE, SavedState, parse_state, state_text
from partita.checkpoint.sealing import Cipher
from partita.checkpoint.transfer import Done, HostRoom, digest_text
from partita.checkpoint.unchanged import Earlier, earlier_files, has_same_bytes, try_link
from partita.checkpoint.writer import Run, Writer, places_in, records_of, runs_in
from partita.comm import Communicator, any_rank, any_rank_each, require_same, text_by_rank
from partita.model import DiffersByRank, TrainState, from_plain, to_plain


@dataclass(frozen=True)
class About:
    """What a manifest says about the run.

    facts: for people. is_latest: the checkpoint is the one that is loaded when no tag is given. earlier: a checkpoint
    that may have the same files of frozen parameters; None: the latest one.
    """

    step: int
    samples: int
    facts: dict[str, Any]
    is_latest: bool = True
    earlier: Path | None = None


class Save:
    """A save that is under way: its files are being written.

    The training state must stay as it is until `finish()`, or until `take_over()`.

    Args:
        state: all ranks write it, each its own part of every tensor, straight from where it is.
        client_state: the program's own; rank 0's is saved.
        room: for `take_over()`; without it nothing is copied but, in pieces, what a device has.
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
        room: HostRoom | None = None,
        protection: Protection = PLAIN,
    ) -> None:
        world = self._world = state.world
        _require_same(world, directory, tag, about, protection)
        sections = state.take_sections()
        self.path = directory / tag
        self._what = what = f"the checkpoint '{self.path}' was not saved"
        client = together(world, what, lambda: _plain_client_state(client_state))
        names = stored_names(state, what)
        mine = together(world, what, lambda: list(pieces(state, names)))
        self._files = together(world, what, partial(_lay_out, _all_specs(world, mine, names), names.frozen))
        self._staging = together(world, what, lambda: Staging(directory, tag, protection.access))  # rank 0's
        self._differing = {s.name: sections.pop(s.name) for s in state.sections if isinstance(s.owner, DiffersByRank)}
        self._small = SavedState(
            sections=sections, ranks=[], client_state=client, aliases=names.aliases, parameters=names.renamed
        )
        self._about, self._protection = about, protection
        envelope = from_rank_0(world, what, protection.new_envelope)
        self._cipher = together(world, what, partial(protection.cipher_in, envelope))
        self._committing: Future[str] | None = None
        self._spoiled = ""
        with ExitStack() as undo:
            undo.callback(self._staging.discard)
            runs = runs_in(self._files, mine)
            made = from_rank_0(
                world,
                what,
                partial(_begin, self._staging, self._files, names.frozen, (directory, about.earlier), protection),
            )
            folder, earlier = Path(json.loads(made)[0]), Earlier.model_validate(json.loads(made)[1])
            self._linked = _link(world, what, folder, self._files, earlier, runs, protection.access.file)
            writer = partial(Writer, folder, self._files, self._linked, world.rank == 0, room, self._cipher)
            self._writer = together(world, what, writer)
            undo.callback(self._writer.close)
            together(world, what, partial(_write, self._writer, runs, state))
            undo.pop_all()

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
        chunks = [tuple(chunk) for _, written in by_rank for chunk in written]
        records = {**records_of(self._files, chunks, self._linked), **self._linked}
        texts = small_files(small, self._files)
        records |= {name: self._write_small(name, text.encode()) for name, text in texts.items()}
        manifest = _manifest(self.path.name, self._about, self._world.world_size, records)
        return self._publish(manifest)

    def _write_small(self, name: str, data: bytes) -> FileRecord:
        """Writes a file as rank 0 alone does."""
        record = record_of(data)
        if self._cipher is not None:
            data, record = sealed_file(self._cipher, name, data, record)
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


def _begin(
    staging: Staging,
    files: Sequence[FileLayout],
    frozen: set[Place],
    earlier_in: tuple[Path, Path | None],
    protection: Protection,
) -> str:
    """On rank 0: makes the folder and its large files; returns, as JSON, the folder's path, and which files are not
    made, as an earlier checkpoint may have them. An encrypted one has other bytes in any case."""
    sweep(earlier_in[0])
    staging.create()
    maybe = [file for file in files if places_in(file) <= frozen and protection.key is None]
    earlier = earlier_files(earlier_in[0], maybe, earlier_in[1])
    for file in files:
        if file.name not in earlier.files:
            preallocate(staging.path / file.name, file.size, protection.access.file)
    return json.dumps([str(staging.path), earlier.model_dump(mode="json", exclude_none=True)])


def _write(writer: Writer, runs: Sequence[Run], state: TrainState) -> None:
    """Begins with what only updates change: the disk has that to do while weights are compared with their masters."""
    writer.write(run for run in runs if not run.piece.is_weight)
    state.adopt_written_parameters()
    writer.write(run for run in runs if run.piece.is_weight)
    writer.sync()


def _link(
    world: Communicator,
    what: str,
    folder: Path,
    files: Sequence[FileLayout],
    earlier: Earlier,
    runs: list[Run],
    mode: int,
) -> dict[str, FileRecord]:
    """Files of an earlier checkpoint that have the bytes of this one get a name in it; the others are made. Returns
    the former."""
    if not earlier.files:
        return {}
    maybe = [(i, file) for i, file in enumerate(files) if file.name in earlier.files]
    own = {file.name: [(run.offset, run.piece.values) for run in runs if run.file == i] for i, file in maybe}

    def compare() -> list[bool]:
        return [not has_same_bytes(earlier.files[file.name], own[file.name], chunk_bytes(files)) for _, file in maybe]

    differs = any_rank_each(world, together(world, what, compare))

    def link() -> str:
        linked = []
        for (_, file), is_other in zip(maybe, differs, strict=True):
            if not is_other and try_link(Path(earlier.folder, file.name), folder / file.name, file.size, mode):
                linked.append(file.name)
            else:
                preallocate(folder / file.name, file.size, mode)
        return json.dumps(linked)

    return {name: earlier.files[name] for name in json.loads(from_rank_0(world, what, link))}


def small_files(small: SavedState, files: Sequence[FileLayout]) -> dict[str, str]:
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


def _lay_out(specs: Mapping[str, list[TensorSpec]], frozen: set[Place]) -> list[FileLayout]:
    """The files; many bytes of frozen parameters have their own."""
    files = []
    for stem, tensors in specs.items():
        still = [spec for spec in tensors if Place(stem, spec.name) in frozen]
        is_much = sum(spec.nbytes for spec in still) > MIN_CHUNK_BYTES
        files += lay_out(stem, tensors, apart={spec.name for spec in still} if is_much else ())
    return files


def record_of(data: bytes) -> FileRecord:
    """A file of these bytes, in chunks."""
    parts = [data[begin : begin + MIN_CHUNK_BYTES] for begin in range(0, len(data), MIN_CHUNK_BYTES)]
    return FileRecord(size=len(data), chunks=[(len(part), digest_text(part)) for part in parts])


def sealed_file(cipher: Cipher, name: str, data: bytes, record: FileRecord) -> tuple[bytes, FileRecord]:
    """A small file as it is encrypted, in the same chunks."""
    parts, seals, begin = [], [], 0
    for length, _ in record.chunks:
        part, seal = cipher.seal_bytes(name, begin, data[begin : begin + length])
        parts.append(part)
        seals.append(seal.hex())
        begin += length
    chunks = [(len(part), digest_text(part)) for part in parts]
    return b"".join(parts), FileRecord(size=record.size, chunks=chunks, seals=seals)
