"""evaluate.py on the Hugging Face folder of a causal language model: texts, dialogues, samples, wrong folders."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import evaluate
import pytest
import torch
from dialogue.dialogues import DEFAULT_TEMPLATE, TEMPLATE_TOKENS
from language.tokens import BPE
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

TEXT = "One, two, three.\nFour, five, six.\n" * 30
DIALOGUES = [("How many?", "Three."), ("And now?", "Four, or five.")]
pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # torch's, without a real stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 with a tokenizer that has a chat template."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(BPE.trained(TEXT.encode(), 280).definition),
        additional_special_tokens=list(TEMPLATE_TOKENS),
    )
    tokenizer.chat_template = DEFAULT_TEMPLATE
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    sizes = GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(sizes).save_pretrained(path)
    return path


def evaluated(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, Any]:
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
    capsys.readouterr()
    return evaluate.main(), capsys.readouterr()


def test_a_text_and_samples(folder, monkeypatch, capsys, tmp_path):
    """Against the model's own loss, window by window."""
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    options = ("--text", file, "--samples", 2, "--sample-length", 3, "--prompt", "Four")
    code, output = evaluated(monkeypatch, capsys, folder, *options)
    assert code == 0, output.err
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    nats = 0.0
    with torch.no_grad():
        for first in range(0, len(ids) - 1, 32):
            targets = ids[first + 1 : first + 33]
            logits = model(ids[None, first : first + len(targets)]).logits[0]
            nats += cross_entropy(logits, targets, reduction="sum").item()
    mean, size = nats / (len(ids) - 1), len(TEXT) - len(tokenizer.decode(ids[0]))
    bits = nats / math.log(2) / size
    assert f"{mean:.4f} nats per token = perplexity {math.exp(mean):,.2f} = {bits:.4f} bits per byte" in output.out
    assert f"over {len(ids) - 1:,} tokens ({size:,} bytes)" in output.out
    assert output.out.count("\nFour") == 2 and "-- sample 2" in output.out
    assert evaluated(monkeypatch, capsys, folder, *options)[1].out == output.out  # drawn from a seed


def test_dialogues_count_the_tokens_of_the_assistant(folder, monkeypatch, capsys, tmp_path):
    file = tmp_path / "dialogues.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in DIALOGUES
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, output = evaluated(monkeypatch, capsys, folder, "--dialogues", file, "--samples", 0)
    assert code == 0, output.err
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    answers = [len(tokenizer(answer + "<|end|>")["input_ids"]) for _, answer in DIALOGUES]
    assert f"over {sum(answers)} tokens of 2 dialogues" in output.out


def test_without_a_text_the_folder_has_nothing_held_out(folder, monkeypatch, capsys):
    code, output = evaluated(monkeypatch, capsys, folder)
    assert code == 2
    assert "does not say what was held out: give a text with --text FILE" in output.err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--text", "missing.txt"), "cannot read the text missing.txt: No such file or directory"),
        (("--dialogues", "missing.jsonl"), "cannot read the dialogues missing.jsonl"),
        (("--megabytes", "0"), "--megabytes: '0' is not a number above 0"),
        (("--temperature", "-1"), "--temperature"),
        (("--data", "missing"), "--data is of classifiers, and "),
    ],
)
def test_wrong_values_are_one_line(folder, monkeypatch, capsys, arguments, complaint):
    code, output = evaluated(monkeypatch, capsys, folder, *arguments)
    assert code == 2
    (line,) = output.err.splitlines()
    assert line.startswith("evaluate.py: error: ") and complaint in line


def test_a_folder_without_weights_is_one_line(folder, monkeypatch, capsys, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    code, output = evaluated(monkeypatch, capsys, tmp_path, "--text", __file__)
    assert code == 2
    (line,) = output.err.splitlines()
    assert f"cannot open {tmp_path} as a causal language model" in line
