"""A save that goes on beside training: at most one, until the next update as it is, and after that from copies."""

from __future__ import annotations

import atexit
import logging
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from partita.model import ModelPart

if TYPE_CHECKING:
    from partita.checkpoint import Save

T = TypeVar("T")

logger = logging.getLogger("partita")


class SaveBeside:
    """The save that is under way, if there is one.

    [Note: saving beside training]
    Weights and optimizer states change in updates only. So native threads write a checkpoint straight from where these
    are while the next forward and backward run. `before_update()` copies what is not written by then, and so does
    `before_write` of the units, for whatever else changes them. Each later update asks whether all ranks are done; then
    rank 0 commits the checkpoint in a thread, and a later update learns what became of it.

    Args:
        parts: of the model.
    """

    def __init__(self, parts: Sequence[ModelPart]) -> None:
        self._units = [flat for part in parts for flat in (*part.units, *part.frozen)]
        self._save: Save | None = None
        self._is_copied = False
        own = weakref.ref(self)
        self._at_exit = lambda: _finish_at_exit(own)

    @property
    def path(self) -> Path | None:
        """Of the checkpoint that is being saved."""
        return None if self._save is None else self._save.path

    def begin(self, save: Save) -> None:
        """From now on `save` is under way; there is no other."""
        self._save, self._is_copied = save, False
        for flat in self._units:
            flat.before_write = self._let_write
        atexit.register(self._at_exit)

    def before_update(self) -> None:
        """Weights and states may change when this returns. A collective.

        Raises:
            CheckpointError: the save has failed; on all ranks.
        """
        if self._save is not None:
            self._let_write()
            if self._ending(self._save.advance):
                self._forget()

    def finish(self) -> Path | None:
        """Waits until the checkpoint is there; its path, or None if no save was under way. A collective.

        Raises:
            CheckpointError: the save has failed; on all ranks.
        """
        if self._save is None:
            return None
        self._look_for_writes(self._save)
        path = self._ending(self._save.finish)
        self._forget()
        return path

    def abandon(self) -> None:
        """Ends the save; nothing is left of it. No collective."""
        if self._save is not None:
            save = self._save
            self._forget()
            save.abandon()

    def _let_write(self) -> None:
        """Copies what is not written yet, unless that has been done."""
        if self._save is not None and not self._is_copied:
            self._look_for_writes(self._save)
            self._save.take_over()
            self._is_copied = True

    def _look_for_writes(self, save: Save) -> None:
        """The program may have written into parameters, of which the files may then have anything."""
        if self._is_copied or save.is_written():
            return
        written = next((name for flat in self._units if (name := flat.first_written()) is not None), None)
        if written is not None:
            save.spoil(
                f"the parameter '{written}' was written to while it was being saved beside training: call "
                "engine.wait_for_save() before you write into parameters"
            )

    def _ending(self, call: Callable[[], T]) -> T:
        """A save that raises is over."""
        try:
            return call()
        except BaseException:
            self._forget()
            raise

    def _forget(self) -> None:
        self._save = None
        for flat in self._units:
            flat.before_write = _nothing
        atexit.unregister(self._at_exit)


def _nothing() -> None:
    pass


def _finish_at_exit(own: weakref.ref[SaveBeside]) -> None:
    """The program has ended without engine.destroy()."""
    beside = own()
    if beside is None or beside.path is None:
        return
    if hasattr(sys, "last_value"):  # an error ends this rank: the others do not come
        logger.error(f"the checkpoint '{beside.path}' was not finished: an error has ended the program")
        beside.abandon()
        return
    try:
        beside.finish()
    except Exception as error:
        logger.error(f"the checkpoint '{beside.path}' was not finished at the end of the program: {error}")
