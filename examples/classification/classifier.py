"""A classifier of `transformers` and its tokenizer: from the hub, from a folder, or from a config alone."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
import transformers
from common.hub import hub_is_there
from common.job import FAILED, JobError
from tokenizers import BertWordPieceTokenizer
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, BertTokenizerFast

_SMALL = {"vocab_size": 8000, "initializer_range": 0.06}  # BERT's 0.02 is for 768: narrow ones would hardly begin
# Sizes where they are not those that transformers has: its DistilBertConfig and BertConfig are the published models.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-tiny": ("bert", {**_SMALL, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}),
    "bert-mini": ("bert", {**_SMALL, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}),
    "distilbert": ("distilbert", {}),
    "distilbert-base-uncased": ("distilbert", {}),
    "bert-base-uncased": ("bert", {}),
}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # in BERT's order
LETTERS = 1000  # rarer ones are unknown
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")
Encoding = dict[str, Any]


# -- the config, the model


def read_config(model: str | None, from_config: str | None, labels: Sequence[str]) -> Any:
    """The model's config, with the labels in it.

    Args:
        model: what `--model` says: a folder or a name of the hub; None where the model is made of `from_config`.
        from_config: one of ARCHITECTURES, a config file, or a folder with one; None where there is a model.

    Raises:
        JobError: there is no such model or config.
    """
    names = {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": _numbers(labels)}
    if model is None and from_config in ARCHITECTURES:
        kind, sizes = ARCHITECTURES[from_config]
        if "hidden_size" in sizes:
            sizes = {**sizes, "intermediate_size": 4 * sizes["hidden_size"]}
        return AutoConfig.for_model(kind, **sizes, **names)
    source = model or _existing(str(from_config), "--from-config")
    return _loaded(AutoConfig, source, **names)


def make_model(config: Any, model: str | None) -> Any:
    """The classifier: pretrained, with a new head where its labels are others, or of its config with random weights."""
    transformers.logging.set_verbosity_error()  # it would say in ten lines that the head is new
    transformers.logging.disable_progress_bar()
    if model is None:
        return AutoModelForSequenceClassification.from_config(config)
    return _loaded(AutoModelForSequenceClassification, model, config=config, ignore_mismatched_sizes=True)


def open_classifier(folder: Path) -> tuple[Any, Any]:
    """The model, in evaluation mode, and the tokenizer that `classify.py` or `save_pretrained` wrote."""
    transformers.logging.disable_progress_bar()
    model = _loaded(AutoModelForSequenceClassification, str(folder))
    return model.eval(), _loaded(AutoTokenizer, str(folder))


def _numbers(labels: Sequence[str]) -> dict[str, int]:
    return {label: number for number, label in enumerate(labels)}


def _existing(given: str, option: str) -> str:
    if not Path(given).exists():
        known = ", ".join(ARCHITECTURES)
        raise JobError(f"{option} {given}: neither a file nor a folder, nor one of {known}")
    return given


def _loaded(kind: Any, source: str, **options: Any) -> Any:
    """`kind.from_pretrained(source)`, whose errors are one line."""
    path = Path(source)
    if not path.exists() and (path.is_absolute() or source.startswith(".") or source.count("/") > 1):
        raise JobError(f"there is no model at {source}: give a folder with config.json and weights")
    if path.is_dir() and not (path / "config.json").exists():
        raise JobError(f"{source} has no config.json: it is not the folder of a Hugging Face model")
    if not path.exists() and not hub_is_there():
        options["local_files_only"] = True  # what was downloaded before is used, and nothing is waited for
    try:
        return kind.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        where = "cannot be opened" if path.exists() else "is no folder here, and the hub cannot give it"
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise JobError(
            f"the model {source!r} {where} ({why}); without a network give a folder, or --from-config distilbert",
            FAILED,
        ) from None


# -- the tokenizer


def make_tokenizer(source: str | None, texts: Sequence[str], vocabulary: int) -> Any:
    """The tokenizer of a model, or one that learns `vocabulary` WordPieces from the texts; the same on all ranks.

    Args:
        source: a folder or a name of the hub; None: there is no pretrained one.
    """
    if source is not None:
        return _loaded(AutoTokenizer, source)
    learned: list[Any] = [None]
    if dist.get_rank() == 0:
        learned = [learned_pieces(texts, vocabulary)]
    dist.broadcast_object_list(learned)
    return BertTokenizerFast(vocab=learned[0], do_lower_case=True)


def learned_pieces(texts: Sequence[str], vocabulary: int) -> dict[str, int]:
    """At most `vocabulary` WordPieces and their numbers, the same whenever the texts are.

    A checkpoint needs the same again. The trainer numbers the letters within words as it meets them, which is in no
    order; so they are given to it as if they were special.
    """
    pieces, counts = BertWordPieceTokenizer(lowercase=True), collections.Counter[str]()
    for text in texts:
        counts.update(pieces.normalize(text))
    by_count = sorted((-count, letter) for letter, count in counts.items() if not letter.isspace())
    letters = sorted(letter for _, letter in by_count[:LETTERS])
    pieces.train_from_iterator(
        texts,
        vocab_size=vocabulary,
        min_frequency=2,
        show_progress=False,
        special_tokens=[*SPECIAL, *(f"##{letter}" for letter in letters)],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
    )
    return dict(pieces.get_vocab())


def tokenizer_source(model: str | None, from_config: str | None) -> str | None:
    """Where a pretrained tokenizer is, if there is one."""
    if model is not None:
        return model
    has_files = from_config is not None and any((Path(from_config) / name).exists() for name in TOKENIZER_FILES)
    return from_config if has_files else None


def digest_of(tokenizer: Any) -> str:
    """Of its vocabulary: two runs with the same one read the same text as the same numbers."""
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(repr(words).encode()).hexdigest()[:16]


# -- samples and batches


class Encoded(Dataset[Encoding]):
    """Texts as token ids, each as long as it is, at most `length`."""

    def __init__(self, tokenizer: Any, texts: Sequence[str], classes: Sequence[int], length: int) -> None:
        # No text of this many characters is shorter than `length` tokens, and long mails take long.
        cut = [text[: 40 * length] for text in texts]
        ids = tokenizer(cut, truncation=True, max_length=length, padding=False, return_attention_mask=False)
        self.ids: list[list[int]] = ids["input_ids"]
        self.classes = list(classes)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: int) -> Encoding:
        return {"input_ids": self.ids[place], "labels": self.classes[place]}


class Collate:
    """Pads a micro-batch to its longest sample: input_ids, attention_mask [samples, tokens], labels [samples]."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, samples: list[Encoding]) -> Encoding:
        return dict(self._tokenizer.pad(samples, padding=True, return_tensors="pt"))
