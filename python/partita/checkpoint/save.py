"""Saving: all ranks write their own parts of the same files."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from partita.checkpoint.agreement import from_rank_0, together
from partita.checkpoint.commit import Staging, sweep
from partita.checkpoint.disk import write_durably
from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.layout import MIN_CHUNK_BYTES, FileLayout, TensorSpec, chunk_bytes, index_text, lay_out
from partita.checkpoint.manifest import FORMAT, MANIFEST, VERSION, FileRecord, Manifest, manifest_text
from partita.checkpoint.pieces import MODEL, OPTIMIZER, Piece, Place, StoredNames, pieces, stem_of
from partita.checkpoint.saved_state import STATE, SavedState, parse_state, state_text
from partita.checkpoint.transfer import Transfer, digest_text
from partita.comm import Communicator, require_same, text_by_rank
from partita.model import DiffersByRank, TrainState, from_plain, to_plain

# (file, offset, length, digest) of what was written in one piece.
Chunk = tuple[int, int, int, str]


@dataclass(frozen=True)
class About:
    """What a manifest says about the run.

    facts: for people. is_latest: the checkpoint is the one that is loaded when no tag is given.
    """

    step: int
    samples: int
    facts: dict[str, Any]
    is_latest: bool = True


def save(state: TrainState, directory: Path, tag: str, about: About, client_state: Mapping[str, Any]) -> Path:
    """Writes a checkpoint DIRECTORY/TAG; returns its path. A collective.

    Every rank writes its own part of every tensor, straight from where it is. An older checkpoint of the same tag is
    there until the new one is complete.

    Args:
        client_state: the program's own; rank 0's is saved.

    Raises:
        RuntimeError: in the midst of a step.
        TypeError, ValueError: a state has something that cannot be saved; names it. The ranks were not given the same.
        CheckpointError: the checkpoint was not written, for the reason that it gives; on all ranks. What was there
            before is still there.
    """
    world = state.world
    require_same(world, [("save_dir", str(directory)), ("tag", tag), ("save_latest", str(about.is_latest))])
    sections = state.take_sections()
    what = f"the checkpoint '{directory / tag}' was not saved"
    client = together(world, what, lambda: _plain_client_state(client_state))
    names = together(world, what, lambda: StoredNames(state))
    mine = together(world, what, lambda: list(pieces(state, names)))
    files = together(world, what, partial(_lay_out, _all_specs(world, mine, names)))
    staging = together(world, what, lambda: Staging(directory, tag))  # rank 0's is used
    try:
        folder = Path(from_rank_0(world, what, partial(_begin, staging, directory, files)))
        chunks = together(world, what, partial(_write, folder, files, mine, world.rank == 0))
        differing = {s.name: sections.pop(s.name) for s in state.sections if isinstance(s.owner, DiffersByRank)}
        by_rank = [json.loads(text) for text in text_by_rank(world, json.dumps([differing, chunks]))]

        def commit() -> str:
            small = SavedState(
                sections=sections,
                ranks=[one for one, _ in by_rank],
                client_state=client,
                aliases=names.aliases,
                parameters=names.renamed,
            )
            records = _records(files, [tuple(chunk) for _, written in by_rank for chunk in written])
            manifest = partial(_manifest, tag, about, world.world_size)
            return _commit(staging, _small_files(small, files), records, manifest, about.is_latest)

        return Path(from_rank_0(world, what, commit))
    except BaseException:
        staging.discard()
        raise


def _plain_client_state(client_state: Mapping[str, Any]) -> Any:
    if not isinstance(client_state, Mapping):
        raise TypeError(f"client_state is a {type(client_state).__name__}: give a dict")
    plain = to_plain(dict(client_state), "client_state")
    from_plain(plain)  # what could not be loaded is refused now
    return plain


def _begin(staging: Staging, directory: Path, files: Sequence[FileLayout]) -> str:
    """On rank 0: makes the folder and its large files; returns the folder's path."""
    sweep(directory)
    staging.create()
    for file in files:
        _preallocate(staging.path / file.name, file.size)
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


def _commit(
    staging: Staging,
    texts: Mapping[str, str],
    records: dict[str, FileRecord],
    manifest: Callable[[dict[str, FileRecord]], Manifest],
    is_latest: bool,
) -> str:
    """On rank 0: writes the small files, the manifest last; returns the path of the checkpoint, which there is now."""
    for name, text in texts.items():
        write_durably(staging.path / name, text.encode())
        records[name] = _record_of(text.encode())
    write_durably(staging.path / MANIFEST, manifest_text(manifest(records)).encode())
    return str(staging.publish(is_latest))


def _manifest(tag: str, about: About, world_size: int, files: dict[str, FileRecord]) -> Manifest:
    return Manifest(
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


def _preallocate(path: Path, size: int) -> None:
    """A new file of this size, whose bytes have their place on the disk."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        why = f"{os.strerror(error.errno or 0)} (there is no room for {size:,} bytes)"
        raise OSError(error.errno, why, str(path)) from None
    finally:
        os.close(fd)


def _write(folder: Path, files: Sequence[FileLayout], mine: Sequence[Piece], heads: bool) -> list[Chunk]:
    """Writes this rank's pieces, and the headers if `heads`; they are on the disk afterwards."""
    index = {Place(stem_of(file.name), name): i for i, file in enumerate(files) for name in file.begin}
    with ExitStack() as exits:
        transfer = exits.enter_context(Transfer(chunk_bytes(files)))
        fds = [_open(folder, file, exits) for file in files]
        for i, file in enumerate(files):
            if heads:
                transfer.write_data(fds[i], 0, file.header, (i, file.name))
        for piece in mine:
            i = index[piece.place]
            begin = files[i].begin[piece.place.name] + piece.first * piece.values.element_size()
            transfer.write(fds[i], begin, piece.values, (i, f"'{piece.place.name}' in {files[i].name}"))
        for i, fd in enumerate(fds):
            transfer.sync(fd, (i, files[i].name))
        return transfer.finish()


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
    by_file: list[list[tuple[int, int, str]]] = [[] for _ in files]
    for i, offset, length, digest in chunks:
        by_file[i].append((offset, length, digest))
    records = {}
    for file, written in zip(files, by_file, strict=True):
        end = 0
        for offset, length, _ in sorted(written):
            if offset != end:
                raise CheckpointError(f"{file.name}: no rank wrote the bytes from {end} on, or two did")
            end += length
        if end != file.size:
            raise CheckpointError(f"{file.name}: no rank wrote the bytes from {end} to {file.size}")
        in_order = [(length, digest) for _, length, digest in sorted(written)]
        records[file.name] = FileRecord(size=file.size, chunks=in_order)
    return records


def _record_of(data: bytes) -> FileRecord:
    parts = [data[begin : begin + MIN_CHUNK_BYTES] for begin in range(0, len(data), MIN_CHUNK_BYTES)]
    return FileRecord(size=len(data), chunks=[(len(part), digest_text(part)) for part in parts])
