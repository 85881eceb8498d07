"""Answers of the chat example: drawn from the right distribution, by seeds of their own, scored and chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from common.job import JobError
from dialogue.dialogues import History
from dialogue.generation import Ends, Sampling, answer_batch, draw
from dialogue.scores import score_named, token_f1
from dialogue.self_training import Candidate, choose, read_feedback, write_feedback
from transformers import AutoConfig, AutoModelForCausalLM

ENDS = Ends(eos=(3,), pad=0)
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [5, 6]]
SEEDS = ["a", "b", "c", "d"]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=24,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    return AutoModelForCausalLM.from_config(config).eval()


# -- drawing


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8), (1.0, 0.05)])
def test_tokens_have_the_probabilities_of_the_softmax(temperature, top_p):
    """With evenly spaced numbers each token comes as often as its probability says."""
    logits, count = torch.tensor([0.3, -1.0, 2.0, 1.1, -4.0]), 20_000
    probabilities = (logits / temperature).softmax(-1)
    kept, total = torch.zeros(5), 0.0
    for token in probabilities.argsort(descending=True).tolist():
        if total < top_p:
            kept[token] = probabilities[token]
        total += probabilities[token].item()
    numbers = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = draw(logits.expand(count, -1), Sampling(1, temperature, top_p), numbers)
    frequencies = tokens.flatten().bincount(minlength=5) / count
    torch.testing.assert_close(frequencies, kept / kept.sum(), rtol=0, atol=2 / count)


@pytest.mark.parametrize("number", [0.0, 1.0 - 2**-53])
def test_the_ends_of_the_numbers_draw_possible_tokens(number):
    logits = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf]])
    token = draw(logits, Sampling(1, 1.0, 1.0), torch.tensor([number], dtype=torch.float64))
    assert token.item() == (2 if number == 0 else 0)


# -- batches


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_does_not_depend_on_its_batch(model, temperature):
    """Padded on the left among others, or alone."""
    sampling = Sampling(12, temperature)
    together = answer_batch(model, PROMPTS, SEEDS, sampling, ENDS)
    for prompt, seed, answer in zip(PROMPTS, SEEDS, together, strict=True):
        (alone,) = answer_batch(model, [prompt], [seed], sampling, ENDS)
        assert alone.ids == answer.ids
        assert alone.likelihood == pytest.approx(answer.likelihood, rel=1e-4)
        assert 3 not in answer.ids[:-1] and len(answer.ids) <= 12
    assert any(answer.ids[-1] == 3 for answer in together) or temperature == 0
    assert len({answer.ids for answer in together}) > 1


def test_other_seeds_draw_other_answers(model):
    first, second = (
        answer_batch(model, [[5, 6]] * 2, seeds, Sampling(10, 1.0), ENDS) for seeds in (["a", "b"], ["a", "c"])
    )
    assert first[0] == second[0] and first[1].ids != second[1].ids


def test_the_likelihood_is_that_of_the_models_own_logits(model):
    for prompt, answer in zip(PROMPTS, answer_batch(model, PROMPTS, SEEDS, Sampling(8, 0.7, 0.9), ENDS), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer.ids]])).logits[0, len(prompt) - 1 : -1]
        each = logits.log_softmax(-1).gather(-1, torch.tensor(answer.ids)[:, None])
        assert answer.likelihood == pytest.approx(each.mean().item(), rel=1e-4)


def test_greedy_answers_are_those_of_transformers(model):
    (answer,) = answer_batch(model, [PROMPTS[0]], None, Sampling(8), ENDS)
    expected = model.generate(
        torch.tensor([PROMPTS[0]]), max_new_tokens=8, do_sample=False, eos_token_id=3, pad_token_id=0
    )
    assert list(answer.ids) == expected[0, 3:].tolist()


# -- scores


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("Rain is water.", ["rain is water."], 1.0),
        ("rain", ["rain is water ."], 0.4),
        ("rain rain rain", ["rain"], 0.5),
        ("sun", ["rain", "the sun"], 2 / 3),
        ("", ["rain"], 0.0),
        ("", [""], 1.0),
    ],
)
def test_token_f1(answer, references, score):
    assert token_f1(answer, references) == pytest.approx(score)


def test_scores_by_name(tmp_path, monkeypatch):
    history = History(({"role": "user", "content": "hi"},), ("hello you",))
    assert score_named("reference")(history, "hello", -1.5) == pytest.approx(2 / 3)
    assert score_named("likelihood")(history, "hello", -1.5) == -1.5
    (tmp_path / "chat_reward.py").write_text(
        "def length(messages, answer, references):\n"
        "    assert messages == [{'role': 'user', 'content': 'hi'}] and references == ['hello you']\n"
        "    return -len(answer)\n"
        "def nothing(messages, answer, references):\n    return float('nan')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert score_named("chat_reward:length")(history, "hello", -1.5) == -5
    for name, message in (
        ("chat_reward:nothing", "returned nan for the answer 'hello'"),
        ("chat_reward:other", "has no function other"),
        ("no_such_module:f", "No module named"),
        ("quality", "give reference, likelihood, or MODULE:FUNCTION"),
    ):
        with pytest.raises(JobError, match=message):
            score_named(name)(history, "hello", -1.5)


# -- the feedback set


def test_the_best_answers_are_kept():
    asked = [History(({"role": "user", "content": str(i)},), ("r",)) for i in range(4)]
    greedy = [Candidate("g", score) for score in (0.5, 0.5, 0.9, 0.1)]
    drawn = [[Candidate("x", 0.4), Candidate("y", 0.8), Candidate("z", 0.8)], [Candidate("x", 0.5)]]
    drawn += [[Candidate("x", 0.2)], [Candidate(" ", 1.0)]]

    def kept(threshold: float, better_only: bool) -> list[tuple[str, str, float, float]]:
        found = choose(asked, greedy, drawn, threshold=threshold, better_only=better_only)
        return [(s.messages[0]["content"], s.messages[-1]["content"], s.score, s.greedy_score) for s in found]

    assert kept(0.0, True) == [("0", "y", 0.8, 0.5)]
    assert kept(0.0, False) == [("0", "y", 0.8, 0.5), ("1", "x", 0.5, 0.5), ("2", "x", 0.2, 0.9)]
    assert kept(0.5, False) == [("0", "y", 0.8, 0.5), ("1", "x", 0.5, 0.5)]


def test_a_feedback_set_is_read_back_or_refused(tmp_path):
    samples = choose(
        [History(({"role": "user", "content": "\u2028é"},), ("r",))],
        [Candidate("g", 0.1)],
        [[Candidate("a\nb", 0.3)]],
        threshold=0,
        better_only=True,
    )
    file = tmp_path / "feedback-1.jsonl"
    digest = write_feedback(samples, file)
    assert read_feedback(file, digest) == samples
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    file.write_text(file.read_text().replace("0.3", "0.4"))
    with pytest.raises(JobError, match="is not the one that the checkpoint was trained on"):
        read_feedback(file, digest)
    file.unlink()
    with pytest.raises(JobError, match="No such file"):
        read_feedback(file, digest)
