"""Tokens of a text: its bytes, or the pieces that byte-pair encoding has learned from a text.

Both keep every byte of a text (UTF-8 where there are pieces), so that losses in nats per token of either become bits
per byte that compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from common.job import FAILED, JobError
from torch import Tensor

BYTES = 256  # which each are a token of their own, in both kinds
_LINES_AT_ONCE = 4096


class Tokenizer(Protocol):
    """kind: its name on the command line. vocabulary: how many tokens there are."""

    kind: str
    vocabulary: int

    def encode(self, text: bytes) -> Tensor:
        """Token ids [n], of the smallest integer type that has the vocabulary."""
        ...

    def decode(self, ids: Sequence[int]) -> bytes: ...

    def byte_counts(self) -> Tensor:
        """[vocabulary] int64: the bytes of each token."""
        ...


class Bytes:
    """Every byte is a token."""

    kind = "bytes"
    vocabulary = BYTES

    def encode(self, text: bytes) -> Tensor:
        return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)

    def decode(self, ids: Sequence[int]) -> bytes:
        return bytes(ids)

    def byte_counts(self) -> Tensor:
        return torch.ones(BYTES, dtype=torch.int64)


class BPE:
    """Byte-level byte-pair encoding, as GPT-2's, of the library `tokenizers`.

    Args:
        definition: the JSON of a tokenizer.json.
    """

    kind = "bpe"

    def __init__(self, definition: str) -> None:
        self.definition = definition
        self._tokenizer = _library().Tokenizer.from_str(definition)
        self.vocabulary: int = self._tokenizer.get_vocab_size()

    @classmethod
    def trained(cls, text: bytes, vocabulary: int) -> BPE:
        """Learned from a text; of a short text come fewer tokens than `vocabulary`."""
        library = _library()
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        alphabet = library.pre_tokenizers.ByteLevel.alphabet()
        trainer = library.trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(_lines(text), trainer)
        return cls(tokenizer.to_str())

    @classmethod
    def read(cls, file: Path) -> BPE:
        try:
            return cls(file.read_text(encoding="utf-8"))
        except JobError:
            raise
        except Exception as error:  # the library raises nothing narrower
            raise JobError(f"{file} is no tokenizer: {error}") from None

    def encode(self, text: bytes) -> Tensor:
        lines, ids = _lines(text), []
        for first in range(0, len(lines), _LINES_AT_ONCE):
            for line in self._tokenizer.encode_batch_fast(lines[first : first + _LINES_AT_ONCE]):
                ids += line.ids
        return torch.tensor(ids, dtype=torch.int16 if self.vocabulary <= 2**15 else torch.int32)

    def decode(self, ids: Sequence[int]) -> bytes:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text.encode()

    def byte_counts(self) -> Tensor:
        """The library writes each byte of a token as one character."""
        pieces = (self._tokenizer.id_to_token(token) for token in range(self.vocabulary))
        return torch.tensor([len(piece) for piece in pieces], dtype=torch.int64)


def same_on_all_ranks(text: bytes, vocabulary: int, kept: Path | None) -> BPE:
    """Rank 0 reads the file `kept` where it is there, and trains a tokenizer otherwise. A collective."""
    definition: list[Any] = [None]
    if dist.get_rank() == 0:
        is_kept = kept is not None and kept.is_file()
        definition = [(BPE.read(kept) if is_kept else BPE.trained(text, vocabulary)).definition]
    dist.broadcast_object_list(definition)
    return BPE(definition[0])


def _lines(text: bytes) -> list[str]:
    """A text's lines with their ends. What is not UTF-8 becomes U+FFFD."""
    return text.decode(errors="replace").splitlines(keepends=True)


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise JobError(
            "--tokenizer bpe needs the library tokenizers: pip install 'partita[examples]'", FAILED
        ) from None
    return tokenizers
