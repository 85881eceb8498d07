"""A checkpoint that one process writes, of tensors that it does not train."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from partita.checkpoint.commit import Staging, sweep
from partita.checkpoint.deepspeed_states import Parts
from partita.checkpoint.disk import OWNER, preallocate, write_durably
from partita.checkpoint.layout import MIN_CHUNK_BYTES, FileLayout, TensorSpec, chunk_bytes, lay_out
from partita.checkpoint.manifest import MANIFEST, FileRecord, Manifest, manifest_text
from partita.checkpoint.places import MODEL, OPTIMIZER, Place, stem_of
from partita.checkpoint.protection import PLAIN, Protection
from partita.checkpoint.save import record_of, sealed_file, small_files
from partita.checkpoint.saved_state import SavedState
from partita.checkpoint.transfer import COPIED_BYTES, Done, Transfer
from partita.checkpoint.writer import records_of
from partita.model import DTYPE_NAMES


class WrittenAlone:
    """A checkpoint DIRECTORY/TAG of these tensors and small states.

    Args:
        tensors: in the order of the files.
        facts: for people.
        protection: the key with which it is encrypted.

    Raises:
        CheckpointError, ValueError: a tensor or the tag cannot be in a checkpoint; names it.
    """

    def __init__(
        self,
        directory: Path,
        tag: str,
        tensors: Mapping[Place, Parts],
        small: SavedState,
        *,
        step: int,
        samples: int,
        facts: dict[str, Any],
        protection: Protection = PLAIN,
    ) -> None:
        self._tensors = tensors
        specs = {place: _spec(place, parts) for place, parts in tensors.items()}
        by_stem = {stem: [spec for place, spec in specs.items() if place.stem == stem] for stem in (MODEL, OPTIMIZER)}
        self._files = [file for stem, listed in by_stem.items() for file in lay_out(stem, listed)]
        self._texts = small_files(small, self._files)
        self._protection = protection
        self._cipher = protection.cipher_in(protection.new_envelope())
        self._manifest = Manifest(
            tag=tag,
            step=step,
            samples=samples,
            world_size=1,
            created=datetime.now(timezone.utc).isoformat(timespec="microseconds"),
            engine=facts,
            files={},
        )
        self._directory = directory
        self._staging = Staging(directory, tag)
        self.nbytes = sum(file.size for file in self._files)

    def write(self) -> Iterator[int]:
        """Writes it; gives the bytes of each tensor once it is written. The checkpoint is there at the end.

        Raises:
            CheckpointError, OSError: it cannot be written, or a tensor not be read; nothing of it is left.
        """
        try:
            if self._directory.is_dir():
                sweep(self._directory)
            self._staging.create()
            records: dict[str, FileRecord] = {}
            for file in self._files:
                yield from self._write_file(file, records)
            for name, text in self._texts.items():
                data, record = text.encode(), record_of(text.encode())
                if self._cipher is not None:
                    data, record = sealed_file(self._cipher, name, data, record)
                write_durably(self._staging.path / name, data)
                records[name] = record
            manifest = self._manifest.model_copy(update={"files": records})
            manifest = self._protection.sealed(self._directory, manifest, self._cipher, "imported")
            with self._protection.telling(self._directory, manifest.tag, self._cipher):
                write_durably(self._staging.path / MANIFEST, manifest_text(manifest).encode())
                self._staging.publish()
        finally:
            self._staging.discard()  # which does nothing to a published one

    def _write_file(self, file: FileLayout, records: dict[str, FileRecord]) -> Iterator[int]:
        path = self._staging.path / file.name
        cipher, chunks = self._cipher, list[Done]()

        def seals(_: int, offset: int, data: memoryview, into: memoryview) -> bytes:
            assert cipher is not None
            return cipher.seal(file.name, offset, data, into)

        with ExitStack() as exits:
            preallocate(path, file.size, OWNER.file)
            fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
            exits.callback(os.close, fd)
            transfer = exits.enter_context(Transfer(chunk_bytes(self._files), seals=None if cipher is None else seals))
            transfer.write_data(fd, 0, file.header, (0, file.name))
            for name, begin in file.begin.items():
                parts = self._tensors[Place(stem_of(file.name), name)]
                end = begin
                for values in _pieces(parts):
                    transfer.write(fd, end, values, (0, f"'{name}' in '{path}'"))
                    end += values.nbytes
                    chunks += transfer.finish()
                yield end - begin
            transfer.sync(fd, (0, str(path)))
            chunks += transfer.finish()
        records |= records_of([file], chunks, ())


def _pieces(parts: Parts) -> Iterator[Tensor]:
    """The elements in the dtype in which they are written, in runs of at most COPIED_BYTES. A small tensor is one."""
    if parts.numel * parts.dtype.itemsize <= MIN_CHUNK_BYTES and len(parts.parts) > 1:
        yield torch.cat([part.to(parts.dtype) for part in parts.parts])
        return
    step = COPIED_BYTES // max(parts.dtype.itemsize, 4)
    for part in parts.parts:
        for first in range(0, part.numel(), step):
            yield part[first : first + step].to(parts.dtype)


def _spec(place: Place, parts: Parts) -> TensorSpec:
    return TensorSpec(place.name, DTYPE_NAMES.get(parts.dtype, str(parts.dtype)), parts.shape)
