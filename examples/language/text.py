"""Text: where it comes from, the held-out tail, the windows that a language model reads, and the loss to beat."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from common.job import JobError
from torch import Tensor
from torch.utils.data import Dataset

from language.tokens import Bytes, Tokenizer

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
    """A text in consecutive windows: sample i is (tokens, targets), [context] int64 each, targets one token ahead.

    Args:
        data: the token ids of the text, [n] of any integer type.
    """

    def __init__(self, data: Tensor, context: int) -> None:
        self.context = context
        self.data = data
        self.length = max(0, len(data) - 1) // context

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

    def targets(self, samples: list[int]) -> Tensor:
        """All targets of these samples, [n] int64."""
        return torch.cat([self[i][1] for i in samples])


@dataclass(frozen=True)
class Corpus:
    """What is trained on and what is held out."""

    train: Windows
    held_out: Windows
    tokenizer: Tokenizer


def cut(text: bytes) -> tuple[bytes, bytes]:
    """What is trained on, and the held-out tail. The cut is between two characters of UTF-8."""
    at = int(len(text) * (1 - HELD_OUT))
    while at < len(text) and text[at] & 0xC0 == 0x80:
        at += 1
    return text[:at], text[at:]


def split(
    text: bytes, context: int, *, train_windows: int, held_out_windows: int, tokenizer: Tokenizer | None = None
) -> Corpus:
    """Holds out the tail of a text.

    Args:
        context: tokens that the model sees at once.
        train_windows, held_out_windows: the least number that a run needs.
        tokenizer: of the text; None: bytes.

    Raises:
        TextError: the text is too short for these.
    """
    tokenizer = tokenizer or Bytes()
    train, held_out = (Windows(tokenizer.encode(part), context) for part in cut(text))
    for windows, needed, use in (
        (train, train_windows, "a training batch"),
        (held_out, held_out_windows, f"validation (the last {HELD_OUT:.0%})"),
    ):
        if len(windows) < needed:
            raise TextError(
                f"the text is too short: {len(text):,} bytes leave {len(windows)} windows of {context} "
                f"{'bytes' if tokenizer.kind == 'bytes' else 'tokens'} for {use}, which needs {needed}; "
                "give a longer text, or lower --context or --batch-size"
            )
    return Corpus(train, held_out, tokenizer)


def unigram_entropy(train: Tensor, targets: Tensor, vocabulary: int) -> float:
    """What a model loses that knows how often each token is, and nothing of those before: in nats per token.

    It is the mean of -log p over `targets`, where p is a token's share of `train` (each token is counted once more
    than it is there, so that none has p = 0).
    """
    counts = torch.bincount(train.long(), minlength=vocabulary).double() + 1
    return float((counts.sum().log() - counts.log())[targets].mean())


def _is_library(path: Path, root: Path) -> bool:
    parts = path.relative_to(root).parts
    # The build's own settings are generated, and differ from machine to machine.
    return path.is_file() and not _NOT_LIBRARY.intersection(parts) and not path.name.startswith("_sysconfigdata")
