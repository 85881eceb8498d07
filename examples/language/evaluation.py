"""How good a language model is: its loss on a text or on dialogues, and what it writes.

A model is a folder that pretrain_lm.py has written (--out, or its checkpoints), or the Hugging Face folder of a causal
language model.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from common.job import JobError
from partita.checkpoint import checkpoints, export, find
from safetensors.torch import load_file
from torch import Tensor, nn

from language.models import MODELS, ModelConfig
from language.results import DESCRIPTION, generate, read_description, read_tokenizer
from language.text import cut, read_text, standard_library_text, unigram_entropy

WEIGHTS = "model.safetensors"
_BATCH_TOKENS = 4096
_LONGEST = 1024  # tokens that a model of Hugging Face's reads at once, if it could read more


class Pieces(Protocol):
    """What turns text into tokens and back."""

    def encode(self, text: bytes) -> Tensor: ...

    def decode(self, ids: list[int]) -> bytes: ...


@dataclass(frozen=True)
class LanguageModel:
    """A model to be asked.

    Attributes:
        name: what it is, in words.
        logits: from token ids [batch, length] to logits [batch, length, vocabulary].
        context: tokens that it sees at once.
        description: what pretrain_lm.py says of it; None: it is of Hugging Face's kind.
        tokenizer: of Hugging Face's kind, for dialogues.
    """

    name: str
    logits: Callable[[Tensor], Tensor]
    context: int
    pieces: Pieces
    description: dict[str, Any] | None = None
    tokenizer: Any = None


@dataclass(frozen=True)
class TextLoss:
    """Sums over what was predicted."""

    nats: float
    tokens: int
    bytes: int

    @property
    def mean(self) -> float:
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    def __str__(self) -> str:
        perplexity = math.exp(min(self.mean, 700.0))
        return (
            f"{self.mean:.4f} nats per token = perplexity {perplexity:,.2f} = {self.bits_per_byte:.4f} bits per byte, "
            f"over {self.tokens:,} tokens ({self.bytes:,} bytes)"
        )


# -- opening one


def is_language_model(path: Path) -> bool:
    return _described(path) is not None or _is_causal(path)


def open_language_model(path: Path) -> LanguageModel:
    """Raises JobError: it cannot be opened."""
    folder = _described(path)
    return _open_hugging_face(path) if folder is None else _open_own(path, folder)


def _described(path: Path) -> Path | None:
    """The folder whose model.json says what the weights at `path` are: itself, or one above a checkpoint."""
    folder = path.resolve()
    above = folder.parent if folder.is_file() else folder
    return next((folder for folder in (above, *above.parents[:2]) if _names_a_model(folder)), None)


def _names_a_model(folder: Path) -> bool:
    return (read_description(folder) or {}).get("architecture") in MODELS


def _is_causal(path: Path) -> bool:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    names = config.get("architectures") or [] if isinstance(config, dict) else []
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def _open_own(path: Path, folder: Path) -> LanguageModel:
    description = read_description(folder)
    assert description is not None
    try:
        sizes = ModelConfig(**description["sizes"])
        tokenizer = read_tokenizer(folder, description.get("tokenizer", "bytes"))
        model = MODELS[description["architecture"]](sizes)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise JobError(f"{folder / DESCRIPTION} does not describe a model: {error}") from None
    weights, origin = _weights(path)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise JobError(f"the weights of {origin} are not those of {folder / DESCRIPTION}: {reason}") from None
    name = f"{description['architecture'].upper()}, {_millions(model)}, of {origin}"
    return LanguageModel(name, model.eval(), sizes.context, tokenizer, description)


def _weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """Float32 weights of a file, of an --out folder or of a checkpoint, and where they are from."""
    file = path if path.is_file() else path / WEIGHTS
    is_checkpoint = path.is_dir() and ((path / "manifest.json").is_file() or not file.is_file())
    if not is_checkpoint:
        return _loaded(file), str(file)
    found = find(path.parent, path.name) if (path / "manifest.json").is_file() else _newest(path)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / WEIGHTS
        for _ in export(found, copy, torch.float32):
            pass
        return _loaded(copy), str(found.path)


def _newest(path: Path) -> Any:
    found = checkpoints(path)
    if not found:
        raise JobError(f"{path} has neither {WEIGHTS} nor a checkpoint")
    return found[0]


def _loaded(file: Path) -> dict[str, Tensor]:
    try:
        return {name: value.float() for name, value in load_file(file).items()}
    except Exception as error:  # the library's, of a file that is none of its kind
        raise JobError(f"cannot read the weights {file}: {error}") from None


class _HuggingFacePieces:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: bytes) -> Tensor:
        decoded = text.decode(errors="replace")
        return torch.tensor(self._tokenizer(decoded, add_special_tokens=False, verbose=False)["input_ids"])

    def decode(self, ids: list[int]) -> bytes:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text.encode()


def _open_hugging_face(path: Path) -> LanguageModel:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError:
        raise JobError(f"{path} needs transformers: pip install 'partita[examples]'") from None
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # many kinds, of a damaged or an incomplete folder
        raise JobError(f"cannot open {path} as a causal language model: {error}") from None
    longest = getattr(model.config, "max_position_embeddings", None) or _LONGEST
    return LanguageModel(
        f"{type(model).__name__}, {_millions(model)}, of {path}",
        lambda ids: model(ids).logits,
        min(longest, _LONGEST),
        _HuggingFacePieces(tokenizer),
        tokenizer=tokenizer,
    )


def _millions(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"


# -- asking it


def held_out_of(model: LanguageModel, max_bytes: int) -> tuple[bytes, bytes, str]:
    """What the model was not trained on, what it was trained on, and where both are from.

    Raises:
        JobError: the model does not say what it was trained on, or that is not there.
    """
    text = (model.description or {}).get("text")
    if text is None:
        raise JobError(
            f"{model.name} does not say what was held out: give a text with --text FILE, or --dialogues FILE"
        )
    limit = int(text["megabytes"] * 1e6)
    whole = standard_library_text(limit) if text["file"] is None else read_text(Path(text["file"]), limit)
    train, held_out = cut(whole)
    where = "Python's standard library" if text["file"] is None else text["file"]
    return held_out[:max_bytes], train, f"the held-out part of {where}"


@torch.inference_mode()
def text_loss(model: LanguageModel, text: bytes) -> TextLoss:
    """Over windows of the model's context, each by itself. The first token is given, and not predicted.

    Raises:
        JobError: the text has fewer than two tokens.
    """
    ids = model.pieces.encode(text).long()
    if len(ids) < 2:
        raise JobError(f"a text of {len(text)} bytes is too short: it needs two tokens")
    nats = sum(float(_losses(model, *batch).sum()) for batch in _batches(ids, model.context))
    first = len(model.pieces.decode([int(ids[0])]))
    return TextLoss(nats, len(ids) - 1, max(1, len(text) - first))


def _batches(ids: Tensor, context: int) -> Iterable[tuple[Tensor, Tensor]]:
    """(tokens, targets) in windows of `context` and a shorter last one."""
    whole = (len(ids) - 1) // context
    tokens, targets = ids[: whole * context].view(-1, context), ids[1 : whole * context + 1].view(-1, context)
    size = max(1, _BATCH_TOKENS // context)
    yield from zip(tokens.split(size), targets.split(size), strict=True)
    if whole * context < len(ids) - 1:
        yield ids[whole * context : -1][None], ids[whole * context + 1 :][None]


def _losses(model: LanguageModel, tokens: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model.logits(tokens).float().flatten(0, 1), targets.flatten(), reduction="none")


def baseline(model: LanguageModel, train: bytes, text: bytes) -> TextLoss:
    """The unigram entropy of `text` under the counts of `train`."""
    counted, ids = model.pieces.encode(train), model.pieces.encode(text).long()
    vocabulary = ModelConfig(**(model.description or {})["sizes"]).vocabulary
    mean = unigram_entropy(counted, ids[1:], vocabulary)
    first = len(model.pieces.decode([int(ids[0])]))
    return TextLoss(mean * (len(ids) - 1), len(ids) - 1, max(1, len(text) - first))


@torch.inference_mode()
def dialogue_loss(model: LanguageModel, file: Path) -> str:
    """The loss on the assistant's tokens of dialogues, in a line."""
    from dialogue.dialogues import encode, read_dialogues

    nats, tokens, dialogues = 0.0, 0, read_dialogues(file)
    for dialogue in dialogues:
        encoded = encode(model.tokenizer, dialogue.messages)
        ids, answers = torch.tensor(encoded.ids[-model.context :]), torch.tensor(encoded.answers[-model.context :])
        if len(ids) > 1:
            losses = _losses(model, ids[None, :-1], ids[None, 1:])[answers[1:]]
            nats, tokens = nats + float(losses.sum()), tokens + len(losses)
    if not tokens:
        raise JobError(f"{file} has no token of the assistant's")
    mean = nats / tokens
    return (
        f"{mean:.4f} nats per token of the assistant's = perplexity {math.exp(min(mean, 700.0)):,.2f}, "
        f"over {tokens:,} tokens of {len(dialogues):,} dialogues"
    )


@torch.inference_mode()
def continuation(model: LanguageModel, prompt: str, length: int, *, temperature: float, seed: int) -> str:
    """The prompt and `length` more tokens."""
    start = model.pieces.encode(prompt.encode())
    ids = generate(
        lambda ids: model.logits(ids)[0, -1], start, length, context=model.context, temperature=temperature, seed=seed
    )
    return model.pieces.decode(ids).decode(errors="replace")
