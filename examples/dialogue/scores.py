"""How good an answer is: against references, by the model's own likelihood, or as a function of the user's says."""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from common.job import JobError

from dialogue.dialogues import History, Message

Reward = Callable[[list[Message], str, list[str]], float]
Score = Callable[[History, str, float], float]  # of (history, answer, mean log-likelihood of its tokens)

_WORDS = re.compile(r"\w+|[^\w\s]")


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words and signs, in lower case, against the nearest reference."""
    return max(_f1(_words(answer), _words(reference)) for reference in references)


def _words(text: str) -> Counter[str]:
    return Counter(_WORDS.findall(text.lower()))


def _f1(answer: Counter[str], reference: Counter[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    return 2 * (answer & reference).total() / (answer.total() + reference.total())


def score_named(name: str) -> Score:
    """`reference`, `likelihood`, or MODULE:FUNCTION, which is called as function(messages, answer, references).

    Raises:
        JobError: there is no such module or function; when the function is called: it does not return a finite number.
    """
    if name == "reference":
        return lambda history, answer, likelihood: token_f1(answer, history.references)
    if name == "likelihood":
        return lambda history, answer, likelihood: likelihood
    reward = _load(name)

    def score(history: History, answer: str, likelihood: float) -> float:
        try:
            value = float(reward(list(history.messages), answer, list(history.references)))
        except Exception as error:
            raise JobError(f"--score {name} failed on the answer {answer!r}: {error!r}") from error
        if not math.isfinite(value):
            raise JobError(f"--score {name} returned {value} for the answer {answer!r}: a score is a finite number")
        return value

    return score


def _load(name: str) -> Reward:
    module, separator, function = name.partition(":")
    if not (separator and module and function):
        raise JobError(f"--score {name}: give reference, likelihood, or MODULE:FUNCTION")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        reward = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise JobError(f"--score {name}: {error}") from None
    if not callable(reward):
        raise JobError(f"--score {name}: {module} has no function {function}")
    return reward  # type: ignore[no-any-return]
