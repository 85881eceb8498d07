"""The library's messages on a terminal, beside one line that is rewritten and beside the bars of tqdm."""

from __future__ import annotations

import logging
import shutil
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

_ERASE = "\r\x1b[2K"


class ConsoleHandler(logging.StreamHandler[Any]):
    """Writes messages to stderr.

    It also has the line of progress, which stays below all messages: `show()` rewrites it in place. Bars of tqdm, if
    there are some, stay below the messages too.
    """

    def __init__(self) -> None:
        super().__init__()
        self._shown = ""  # on the terminal, with no end of line

    @property
    def can_show(self) -> bool:
        """Whether a line can be rewritten: stderr is a terminal, and no bar of tqdm is there."""
        try:
            return bool(self.stream.isatty()) and not _has_bars()
        except (AttributeError, ValueError):  # the program has no stderr, or has closed it
            return False

    def show(self, line: str) -> None:
        """Takes the place of the line that was shown before."""
        self.acquire()
        try:
            self._shown = line[: shutil.get_terminal_size().columns - 1]
            self._put(_ERASE + self._shown)
        finally:
            self.release()

    def end_line(self) -> None:
        """The line that is shown stays, and what comes next is below it."""
        self.acquire()
        try:
            if self._shown:
                self._shown = ""
                self._put("\n")
        finally:
            self.release()

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a message, above what is shown."""
        with _above_bars(self.stream):
            if self._shown:
                self._put(_ERASE)
            super().emit(record)
            if self._shown:
                self._put(self._shown)

    def _put(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):  # the terminal is gone, and the run goes on
            self._shown = ""


def _has_bars() -> bool:
    tqdm = _tqdm()
    return tqdm is not None and len(getattr(tqdm, "_instances", ())) > 0


def _above_bars(stream: Any) -> AbstractContextManager[Any]:
    """In this block the bars of tqdm are not on the screen."""
    tqdm = _tqdm()
    if tqdm is None or not _has_bars():
        return nullcontext()
    writing: AbstractContextManager[Any] = tqdm.external_write_mode(file=stream)
    return writing


def _tqdm() -> Any:
    """The class, if the program has imported it."""
    return getattr(sys.modules.get("tqdm"), "tqdm", None)
