"""How good a classifier is: its predictions over all ranks, accuracy, F1, the confusion matrix and its picture."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from common.job import JobError
from torch import Tensor

from classification.classifier import Collate, Encoded, Encoding, open_classifier
from classification.labelled import Labelled, majority, read_labelled, read_split

LONGEST = 512  # tokens of a text, where neither model nor tokenizer says
EXCERPT = 160  # characters of a text in the table of predictions
Logits = Callable[[Encoding], Tensor]  # of a micro-batch, [samples, labels]; all ranks call it as often


@dataclass(frozen=True)
class Scores:
    """Of predictions.

    Attributes:
        macro_f1: the mean of the labels' F1, rare ones counting as much as common ones.
        confusion: [label][prediction], in samples.
    """

    samples: int
    accuracy: float
    macro_f1: float
    f1: dict[str, float]
    confusion: list[list[int]]

    def in_a_line(self) -> str:
        return f"accuracy {self.accuracy:.1%}, macro F1 {self.macro_f1:.3f} on {self.samples:,} texts"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


# -- predictions


def probabilities(logits: Logits, data: Encoded, collate: Collate, size: int) -> np.ndarray[Any, Any]:
    """Of each label for each sample, [samples, labels] float32; the ranks share the work, and all have the result.

    Every rank runs as many micro-batches of `size`, for in stage 3 a forward is a collective: a rank that has fewer
    samples repeats one, and its answer is not used.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    by_length = sorted(range(len(data)), key=lambda place: len(data.ids[place]))  # so that little is padded
    mine = by_length[rank::ranks]
    most = -(-len(by_length) // ranks)
    found: list[tuple[int, list[float]]] = []
    for first in range(0, most, size):
        places = mine[first : first + size]
        batch = collate([data[place] for place in places or by_length[:1]])
        answers = torch.softmax(logits(batch).float(), -1).cpu().tolist()
        found += zip(places, answers, strict=False)
    parts: list[Any] = [None] * ranks
    dist.all_gather_object(parts, found)
    answer_of = dict(answer for part in parts for answer in part)
    assert len(answer_of) == len(data) == sum(len(part) for part in parts)  # none is missing, none came twice
    return np.array([answer_of[place] for place in range(len(data))], dtype=np.float32)


def score(probability: np.ndarray[Any, Any], data: Labelled) -> Scores:
    """Of the likeliest labels."""
    # Imported here, as rank 0 alone needs it, and a start of many ranks is slow enough.
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score  # type: ignore[import-untyped]

    said, true, numbers = probability.argmax(1), data.classes(), list(range(len(data.labels)))
    each = f1_score(true, said, labels=numbers, average=None, zero_division=0)
    return Scores(
        samples=len(true),
        accuracy=float(accuracy_score(true, said)),
        macro_f1=float(np.mean(each)),
        f1={label: float(value) for label, value in zip(data.labels, each, strict=True)},
        confusion=confusion_matrix(true, said, labels=numbers).tolist(),
    )


# -- what is written


def write_predictions(file: Path, probability: np.ndarray[Any, Any], data: Labelled) -> None:
    """A table of all predictions, the worst errors first: those to which the right label seemed least likely."""
    true = probability[np.arange(len(data)), data.classes()]
    said = probability.argmax(1)
    with file.open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream)
        table.writerow(["name", "label", "predicted", "right", "probability", "probability_of_label", "text"])
        for place in np.argsort(true, kind="stable"):
            sample, predicted = data.samples[place], data.labels[said[place]]
            chance, of_label = float(probability[place].max()), float(true[place])
            text = " ".join(sample.text.split())[:EXCERPT]
            right = int(predicted == sample.label)
            table.writerow([sample.name, sample.label, predicted, right, f"{chance:.4f}", f"{of_label:.4f}", text])


def plot_confusion(scores: Scores, labels: Sequence[str], title: str, file: Path) -> None:
    """The matrix as a picture: samples in numbers, the share of the label as the colour."""
    from matplotlib.figure import Figure

    counts = np.array(scores.confusion)
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    side = 2.4 + 0.85 * len(labels)
    figure = Figure(figsize=(side + 1.2, side), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*counts.shape):
        colour = "white" if shares[row, column] > 0.6 else "#202124"
        axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=colour, fontsize=11)
    axes.set(xlabel="predicted", ylabel="label")
    axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_title(title, loc="left", fontsize=10)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the label")
    figure.savefig(file)


# -- a saved model


def classifier_at(path: Path) -> Path | None:
    """The Hugging Face folder of a sequence classifier: `path`, or `model` in it, as `classify.py` leaves it."""
    for folder in (path, path / "model"):
        config = folder / "config.json"
        if config.is_file() and "ForSequenceClassification" in config.read_text(encoding="utf-8", errors="replace"):
            return folder
    return None


def evaluate_classifier(
    folder: Path, data: Path | None, *, text: str = "text", label: str = "label", size: int = 16
) -> str:
    """How good a saved classifier is, in some lines; the ranks of the process group share the work.

    Args:
        folder: as `classifier_at` gives it.
        data: as `read_labelled` takes it; None: what its training held out.
        text, label: the columns of a file.
        size: texts in a micro-batch.

    Raises:
        JobError: something cannot be opened, or the data have a label that the model does not know.
    """
    model, tokenizer = open_classifier(folder)
    if data is None:
        samples, what = _held_out(folder), "what its training held out"
    else:
        samples, what = read_labelled(data, text=text, label=label), str(data)
    known = [name for _, name in sorted(model.config.id2label.items())]
    if strange := set(samples.labels) - set(known):
        raise JobError(f"{folder} does not know the label {min(strange)!r}: it knows {', '.join(known)}")
    samples = replace(samples, labels=tuple(known))
    length = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", LONGEST))
    encoded = Encoded(tokenizer, samples.texts(), samples.classes(), length)

    @torch.no_grad()
    def logits(batch: Encoding) -> Tensor:
        found: Tensor = model(**batch).logits
        return found

    scores = score(probabilities(logits, encoded, Collate(tokenizer), size), samples)
    commonest, baseline = majority(samples, samples)
    return "\n".join([f"{what}: {scores.in_a_line()}; always {commonest!r}: {baseline:.1%}", *_table(scores, known)])


def _held_out(folder: Path) -> Labelled:
    """By what `classify.py` has written beside the model."""
    try:
        texts = json.loads((folder.parent / "scores.json").read_text(encoding="utf-8"))["texts"]
        return read_split(**texts)[1][1]
    except (OSError, ValueError, KeyError, TypeError):
        raise JobError(f"what {folder} was held out from is not known: give texts with --data") from None


def _table(scores: Scores, labels: Sequence[str]) -> list[str]:
    """F1 and the confusion matrix, a row for each label."""
    names, width = [label[:12] for label in labels], max(len(label) for label in labels)
    column = max(6, *(len(name) + 2 for name in names))
    heads = [" " * (width + 10), *(f"{name:>{column}}" for name in names), "   (predicted)"]
    lines = ["".join(heads)]
    for label, counts in zip(labels, scores.confusion, strict=True):
        cells = (f"{count:>{column},}" for count in counts)
        lines.append(f"{label:<{width}}  F1 {scores.f1[label]:.3f}{''.join(cells)}")
    return lines
