"""The parts of the pretraining example: tokens, the unigram entropy, rows of neighbours, the words for a gain."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from common.job import JobError
from common.report import Row
from language.autoencoder import begin_with, neighbour_rows
from language.models import GPT, LSTM, ModelConfig
from language.results import gain, require_same_run, write_description
from language.text import HELD_OUT, cut, split, unigram_entropy
from language.tokens import BPE, Bytes
from torch import nn

TEXT = ("The cat sat on the mat.\r\nDer Bär läuft über die Brücke.\n\n\t漢字 \x1c\u2028 and the cat\n" * 40).encode()


@pytest.fixture(scope="module")
def bpe() -> BPE:
    return BPE.trained(TEXT, 300)


@pytest.mark.parametrize("text", [b"", b"x", TEXT, "ganz anderer Text: žluťoučký kůň 🐎\n".encode()])
def test_tokens_keep_every_byte(bpe, text):
    for tokenizer in (bpe, Bytes()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids.tolist()) == text
        assert int(tokenizer.byte_counts()[ids.long()].sum()) == len(text)


def test_a_learned_token_stands_for_several_bytes(bpe, tmp_path):
    assert bpe.vocabulary == len(bpe.byte_counts()) == 300
    assert len(bpe.encode(TEXT)) < len(TEXT) / 2
    (tmp_path / "tokenizer.json").write_text(bpe.definition, encoding="utf-8")
    assert torch.equal(BPE.read(tmp_path / "tokenizer.json").encode(TEXT), bpe.encode(TEXT))
    assert BPE.trained(TEXT, 300).definition == bpe.definition


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(JobError, match=r"tokenizer\.json is no tokenizer"):
        BPE.read(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("length", range(100, 130))
def test_what_is_held_out_begins_with_a_character(length):
    text = ("ä漢🐎" * 40)[:length].encode()
    train, held_out = cut(text)
    assert train + held_out == text
    assert len(held_out) == pytest.approx(HELD_OUT * len(text), abs=4)
    train.decode(), held_out.decode()


def test_windows_of_tokens_follow_each_other(bpe):
    corpus = split(TEXT, 7, train_windows=1, held_out_windows=1, tokenizer=bpe)
    ids = bpe.encode(cut(TEXT)[0]).tolist()
    tokens, targets = corpus.train[3]
    assert (tokens.tolist(), targets.tolist()) == (ids[21:28], ids[22:29])
    assert corpus.train.targets([0, 3]).tolist() == ids[1:8] + ids[22:29]


def test_unigram_entropy_is_that_of_counts():
    train, targets = [0, 0, 0, 1, 2, 2], [0, 2, 3]
    counts = Counter([*train, 0, 1, 2, 3])  # each once more
    expected = -sum(math.log(counts[target] / 10) for target in targets) / 3
    assert unigram_entropy(torch.tensor(train), torch.tensor(targets), 4) == pytest.approx(expected)


def test_rows_are_the_distributions_of_neighbours():
    """Against plain counting. Of five tokens the two most frequent are told apart; the fifth is nowhere."""
    text = [0, 1, 0, 2, 0, 1, 3, 0, 1, 2]
    rows = neighbour_rows(torch.tensor(text), 5, contexts=2)
    assert rows.shape == (5, 6)
    expected = torch.zeros(5, 6)
    for side, pairs in enumerate([[(b, a) for a, b in pairwise(text)], list(pairwise(text))]):
        for token in range(5):
            column = Counter(min(neighbour, 2) for own, neighbour in pairs if own == token)
            for neighbour, count in column.items():
                expected[token, 3 * side + neighbour] = (count / column.total()) ** 0.5
    expected -= expected.mean(0)
    torch.testing.assert_close(rows, expected / expected.square().mean().sqrt())


def test_an_embedding_begins_in_the_size_of_its_own():
    embedding = nn.Embedding(50, 4)
    nn.init.normal_(embedding.weight, std=0.02)
    size, values = embedding.weight.std().item(), torch.randn(50, 4)
    begin_with(embedding, values)
    torch.testing.assert_close(embedding.weight / size, values)


@pytest.mark.parametrize("kind", [GPT, LSTM])
@pytest.mark.parametrize("embedding", [None, 8, 16, 24])
def test_models_take_an_embedding_of_its_own_width(kind, embedding):
    config = ModelConfig(vocabulary=40, context=12, layers=2, heads=2, width=16, embedding=embedding)
    torch.manual_seed(0)
    model, tokens = kind(config), torch.randint(40, (3, 12))
    assert model.tokens.weight.shape == (40, embedding or 16)
    logits = model(tokens)
    assert logits.shape == (3, 12, 40)
    loss = model(tokens, tokens)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()))
    chunked = kind(replace(config, chunked_loss=True))
    chunked.load_state_dict(model.state_dict())
    torch.testing.assert_close(chunked(tokens, tokens), loss)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def rows(losses: dict[int, float | None]) -> list[Row]:
    return [Row(step, 1.0, loss, 1.0, 1.0, 1.0, 1.0, 1.0, 0) for step, loss in losses.items()]


def test_the_gain_is_told_as_it_is():
    cold = rows({0: 6.0, 5: None, 10: 5.5, 20: 5.0, 30: 4.5})
    better = gain(rows({0: 5.9, 10: 5.2, 20: 4.5, 30: 4.0}), cold, bytes_per_token=2.0).splitlines()
    assert better[0].endswith("step 10: 5.200, cold 5.500; step 20: 4.500, cold 5.000; step 30: 4.000, cold 4.500")
    assert better[1] == (
        "gain over a cold start at step 30: 0.500 nats per token = 0.361 bits per byte; "
        "it has the cold start's 4.500 by step 20 of 30"
    )
    worse = gain(rows({0: 6.0, 10: 5.6, 30: 4.75}), cold, bytes_per_token=1.0).splitlines()[1]
    assert worse == "no gain: loss over a cold start at step 30: 0.250 nats per token = 0.361 bits per byte"
    assert "is not known" in gain(rows({0: 6.0, 7: 5.0}), cold, bytes_per_token=1.0)


@pytest.mark.parametrize(
    ("key", "value", "option"),
    [
        ("tokenizer", "bytes", "--tokenizer"),
        ("vocabulary", 500, "--vocabulary"),
        ("pretrained_embedding", True, "--autoencoder"),
        ("architecture", "lstm", "--model"),
        ("sizes", {"width": 64}, "--width"),
        ("text", {"file": "/there/b.txt", "megabytes": 1.0}, "--text"),
        ("text", {"file": None, "megabytes": 1.0}, "--text"),
        ("text", {"file": "/there/a.txt", "megabytes": 2.0}, "--megabytes"),
    ],
)
def test_checkpoints_of_another_run_are_refused_by_the_option(tmp_path, bpe, key, value, option):
    kept: dict[str, Any] = {"tokenizer": "bpe", "vocabulary": 300, "pretrained_embedding": False, "architecture": "gpt"}
    kept |= {"sizes": {"width": 32, "vocabulary": 290}, "text": {"file": "/here/a.txt", "megabytes": 1.0}}
    require_same_run(tmp_path / "nothing", kept)
    write_description(tmp_path, kept, bpe)
    require_same_run(tmp_path, {**kept, "text": {"file": "/there/a.txt", "megabytes": 1.0}})
    with pytest.raises(JobError, match=f"give the same {option}"):
        require_same_run(tmp_path, {**kept, key: value})
