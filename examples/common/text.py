"""Text as bytes: where it comes from, the held-out tail, and the windows that a language model reads."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.job import JobError

HELD_OUT = 0.05  # of the text, at its end
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


class TextError(JobError):
    """The text cannot be read or is too short."""


def standard_library_text(max_bytes: int) -> bytes:
    """The first `max_bytes` of Python's own modules, in the order of their names: the same for one Python version."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py") if _is_library(path, root)}
    chunks, size = [], 0
    for name in sorted(files):
        if size >= max_bytes:
            break
        chunks.append(files[name].read_bytes())
        size += len(chunks[-1])
    if not chunks:
        raise TextError(f"no Python source below {root}: give a text with --text FILE")
    return b"".join(chunks)[:max_bytes]


def read_text(file: Path, max_bytes: int) -> bytes:
    """The first `max_bytes` of a file."""
    try:
        with file.open("rb") as stream:
            return stream.read(max_bytes)
    except OSError as error:
        raise TextError(f"cannot read the text {file}: {error.strerror}") from None


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """A text in consecutive windows: sample i is (tokens, targets), [context] int64 each, targets one byte ahead."""

    def __init__(self, text: bytes, context: int) -> None:
        self.context = context
        self.data = torch.frombuffer(bytearray(text or b"\0"), dtype=torch.uint8)
        self.length = max(0, len(text) - 1) // context

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.context
        window = self.data[start : start + self.context + 1].long()
        return window[:-1], window[1:]

    def spread(self, count: int) -> list[int]:
        """At most `count` sample ids, evenly over the text."""
        count = min(count, self.length)
        return [i * self.length // count for i in range(count)]


@dataclass(frozen=True)
class Corpus:
    """What is trained on and what is held out."""

    train: Windows
    held_out: Windows


def split(text: bytes, context: int, *, train_windows: int, held_out_windows: int) -> Corpus:
    """Holds out the tail of a text.

    Args:
        context: bytes that the model sees at once.
        train_windows, held_out_windows: the least number that a run needs.

    Raises:
        TextError: the text is too short for these.
    """
    cut = int(len(text) * (1 - HELD_OUT))
    corpus = Corpus(Windows(text[:cut], context), Windows(text[cut:], context))
    for windows, needed, use in (
        (corpus.train, train_windows, "a training batch"),
        (corpus.held_out, held_out_windows, f"validation (the last {HELD_OUT:.0%})"),
    ):
        if len(windows) < needed:
            raise TextError(
                f"the text is too short: {len(text):,} bytes leave {len(windows)} windows of {context} bytes "
                f"for {use}, which needs {needed}; give a longer text, or lower --context or --batch-size"
            )
    return corpus


def _is_library(path: Path, root: Path) -> bool:
    parts = path.relative_to(root).parts
    # The build's own settings are generated, and differ from machine to machine.
    return path.is_file() and not _NOT_LIBRARY.intersection(parts) and not path.name.startswith("_sysconfigdata")
