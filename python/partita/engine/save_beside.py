"""A save that goes on beside training: at most one, until the next update as it is, and after that from copies."""

from __future__ import annotations

import atexit
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from partita.model import ModelPart

if TYPE_CHECKING:
    from partita.checkpoint import HostRoom, Save

T = TypeVar("T")

logger = logging.getLogger("partita")


class SaveBeside:
    """The save that is under way, if there is one.

    [Note: saving beside training]
    Weights and optimizer states change in updates only. So native threads write a checkpoint straight from where these
    are while the next forward and backward run. `before_update()` copies what is not written by then, and so does
    `before_write` of the units, for whatever else changes them. After each update the ranks ask whether all are done;
    then rank 0 commits the checkpoint in a thread, and a later step learns what became of it.

    Args:
        parts: of the model.
    """

    def __init__(self, parts: Sequence[ModelPart]) -> None:
        self._units = [flat for part in parts for flat in (*part.units, *part.frozen)]
        self._save: Save | None = None
        self._room: HostRoom | None = None
        self._is_copied = False

    @property
    def path(self) -> Path | None:
        """Of the checkpoint that is being saved."""
        return None if self._save is None else self._save.path

    def begin(self, make: Callable[..., Save]) -> Path:
        """A save is under way from now on; there is no other. Returns the path of the coming checkpoint."""
        from partita.checkpoint import HostRoom  # with pydantic, which `import partita` leaves out

        self._room = self._room or HostRoom()
        save = make(room=self._room)
        self._save, self._is_copied = save, False
        for flat in self._units:
            flat.before_write = self._let_write
        atexit.register(self._finish_at_exit)  # which keeps this alive without an engine
        return save.path

    def before_update(self) -> None:
        """Weights and states may change when this returns."""
        self._let_write()

    def after_update(self) -> None:
        """Goes on with what can be done without waiting. A collective.

        Raises:
            CheckpointError: the save has failed; on all ranks.
        """
        if self._save is not None and self._ending(self._save.advance):
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

    def close(self) -> None:
        """Lets go of the model, when no save is under way any more."""
        self.abandon()
        self._units.clear()
        self._room = None

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
        atexit.unregister(self._finish_at_exit)

    def _finish_at_exit(self) -> None:
        """The program ends without engine.destroy(), or has lost the engine before."""
        path = self.path
        try:
            if hasattr(sys, "last_value"):  # an error ends this rank: the others do not come
                self.abandon()
                logger.error(f"the checkpoint '{path}' was not finished: an error has ended the program")
            else:
                self.finish()
        except Exception as error:
            logger.error(f"the checkpoint '{path}' was not finished at the end of the program: {error}")


def _nothing() -> None:
    pass
