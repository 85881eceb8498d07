"""Importing a checkpoint that DeepSpeed saved: it becomes one that any run of Partita loads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from partita.checkpoint.deepspeed_files import check_sums, find_deepspeed
from partita.checkpoint.deepspeed_run import read_run
from partita.checkpoint.disk import kind_of
from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.protection import PLAIN, Protection
from partita.checkpoint.tags import check_tag
from partita.checkpoint.written_alone import WrittenAlone


class DeepSpeedImport:
    """A checkpoint of DeepSpeed's on its way to DIRECTORY/TAG.

    Args:
        source, tag: where it is, see `find_deepspeed`.
        directory: in which the new one will be; another folder than that of DeepSpeed's, whose `latest` stays.
        new_tag: of the new one; None: the old one's.
        weights_only: leaves out what the optimizer keeps.
        protection: the key with which the new one is encrypted.
        any_objects: objects of unknown classes are left out; False: they are refused. None is ever made.

    Attributes:
        path: of the new checkpoint.
        nbytes: that are read and written.

    Raises:
        CheckpointError: there is no such checkpoint, or it is of a kind that is not read.
        OSError: a folder cannot be read.
    """

    def __init__(
        self,
        source: Path,
        directory: Path,
        tag: str | None = None,
        new_tag: str | None = None,
        *,
        weights_only: bool = False,
        any_objects: bool = False,
        protection: Protection = PLAIN,
    ) -> None:
        self._files = find_deepspeed(source, tag)
        self._options = {"weights_only": weights_only, "any_objects": any_objects}
        self._directory = directory
        self._protection = protection
        self._tag = check_tag(self._files.folder.resolve().name if new_tag is None else new_tag)
        self.path = directory / self._tag
        self._require_place()
        self.nbytes = 2 * sum(path.stat().st_size for path in self._files.all)
        self.notes: list[str] = []

    def run(self) -> Iterator[int]:
        """Checks the files, reads them and writes the new checkpoint; gives bytes that were read or written.

        Raises:
            CheckpointError, OSError, ValueError: a file is damaged, missing or not DeepSpeed's, or the new checkpoint
                cannot be written; nothing of it is left.
        """
        for path in self._files.all:
            yield from check_sums(path)
        run = read_run(self._files, **self._options)
        written = WrittenAlone(
            self._directory,
            self._tag,
            run.tensors,
            run.small,
            step=run.step,
            samples=run.samples,
            facts=run.facts,
            protection=self._protection,
        )
        yield from written.write()
        self.notes = run.notes

    def _require_place(self) -> None:
        folder = self._files.folder.resolve()
        directory = Path(os.path.realpath(self._directory))
        if directory in (folder, folder.parent):
            raise CheckpointError(
                f"'{self._directory}' is the folder of DeepSpeed's checkpoints, whose file 'latest' would name the new "
                "one: give another folder"
            )
        if kind_of(self.path) is not None:
            raise CheckpointError(f"'{self.path}' is there already: give another --as-tag, or remove it")
