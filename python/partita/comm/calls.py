"""Which call of an engine a rank is in: for the errors of ranks whose calls do not match."""

from __future__ import annotations

import sys
from types import TracebackType

from partita._core import CommunicationError

FEWER_BATCHES = "did it have fewer batches?"


class Calls:
    """The outermost engine call that the program is in. All communicators of a job share one object.

    Attributes:
        name: as a program writes the call, "step()"; empty outside of all calls.
        has_failed: a collective has failed in one of the calls: others will not come, and a GPU may never be done.
    """

    def __init__(self) -> None:
        self.name = ""
        self.has_failed = False

    def inside(self, name: str) -> InsideCall:
        """In this block the program is in the call `name`, unless it is in another one already."""
        return InsideCall(self, name)


class InsideCall:
    """The block of `Calls.inside`; a class, as a generator would cost several times as much in every step."""

    __slots__ = ("_calls", "_name", "_outer")

    def __init__(self, calls: Calls, name: str) -> None:
        self._calls = calls
        self._name = name
        self._outer = ""

    def __enter__(self) -> None:
        self._outer = self._calls.name
        self._calls.name = self._outer or self._name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._calls.name = self._outer
        if kind is not None and issubclass(kind, CommunicationError):
            self._calls.has_failed = True


def exception_under_way() -> BaseException | None:
    """What the program is handling, or what ends it; None: nothing. The end of an iterator is no exception here."""
    error = sys.exc_info()[1]
    return None if isinstance(error, StopIteration | StopAsyncIteration) else error


def error_under_way() -> BaseException | None:
    """The same, but for what a user or the system asks for, which is no error."""
    error = exception_under_way()
    return error if isinstance(error, Exception) else None


def why_leaving() -> str:
    """Why this rank leaves in the midst of its program: the exception under way, if there is one."""
    error = exception_under_way()
    return f"its engine was destroyed: {FEWER_BATCHES}" if error is None else f"it failed with {_in_short(error)}"


def why_ending() -> str:
    """Why this rank leaves at the end of its program: the exception that ended the program, if one did."""
    error = getattr(sys, "last_value", None)
    if error is None:
        return f"its engine is gone or its program has ended: {FEWER_BATCHES}"
    return f"its program ended with {_in_short(error)}"


def _in_short(error: BaseException) -> str:
    text = str(error).strip()
    return type(error).__name__ + (f": {text.splitlines()[0]}" if text else "")
