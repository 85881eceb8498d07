"""The valid name that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name closest in spelling, whatever its case; None if none is close."""
    by_lower_case = {each.lower(): each for each in valid}
    near = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
    return by_lower_case[near[0]] if near else None


def suggest(name: str, valid: Iterable[str]) -> str:
    """The end of an error message: the name that was probably meant, or all that are valid."""
    names = list(valid)
    meant = nearest(name, names)
    return f"; did you mean {meant!r}?" if meant else f"; valid are {', '.join(names)}"
