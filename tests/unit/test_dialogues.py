"""Dialogues of the chat example: what a line must be, whose tokens are learned, packed rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dialogue.dialogues import (
    Dialogue,
    DialogueError,
    Encoded,
    encode,
    encode_prompt,
    histories,
    hold_out,
    read_dialogues,
    shorten,
    without_repeats,
)
from dialogue.model import tokenizer_of, train_tokenizer
from dialogue.packing import IGNORED, Arrangement, Rows, collate, pack, valid_tokens
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "num_key_value_heads": 1, "max_position_embeddings": 64},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
}


def said(*turns: str) -> Dialogue:
    """u:..., a:... or s:... for each message."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return Dialogue(tuple({"role": roles[turn[0]], "content": turn[2:]} for turn in turns))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    dialogues = [said("u:what is rain", "a:rain is water"), said("s:be short", "u:hello", "a:hi")]
    return tokenizer_of(train_tokenizer(dialogues, 300))


# -- lines


def test_lines_are_dialogues_up_to_the_last_answer(tmp_path):
    file = tmp_path / "d.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    file.write_text(json.dumps({"messages": turns, "topic": "x"}) + "\n\n" + json.dumps({"messages": turns[:2]}))
    assert read_dialogues(file) == [Dialogue(tuple(turns[:2]))] * 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', r"not JSON: Expecting value"),
        ("[1]", "at least one message"),
        ('{"messages": []}', "at least one message"),
        ('{"messages": ["hi"]}', "message 1 is no object"),
        ('{"messages": [{"content": "hi"}]}', "message 1 has no role that is a text"),
        ('{"messages": [{"role": "user", "content": null}]}', "message 1 has no content that is a text"),
        ('{"messages": [{"role": "bot", "content": "hi"}]}', "unknown role 'bot': there are system, user, assistant"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "no message of the role 'assistant' follows another"),
        ('{"messages": [{"role": "assistant", "content": "hi"}]}', "nothing to learn"),
        ('{"messages": [{"role": "assistant", "content": " "}]}', "message 1: the assistant's content is empty"),
    ],
)
def test_what_is_no_dialogue_is_named_with_its_line(tmp_path, line, message):
    file = tmp_path / "d.jsonl"
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    file.write_text(f"{good}\n{line}\n")
    with pytest.raises(DialogueError, match=message) as raised:
        read_dialogues(file)
    assert str(raised.value).startswith(f"{file}:2: ")
    assert "\n" not in str(raised.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(DialogueError, match=r"nothing.jsonl: No such file .*make data"):
        read_dialogues(tmp_path / "nothing.jsonl")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(DialogueError, match="it is not UTF-8"):
        read_dialogues(tmp_path / "bytes")
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(DialogueError, match="is empty"):
        read_dialogues(tmp_path / "empty")


def test_held_out_questions_are_not_trained_on():
    dialogues = [said(f"u:{'Q' if n % 2 else 'q'}{n % 10}", f"a:{n}") for n in range(30)]
    train, held_out = hold_out([*dialogues, *dialogues[:5]], 0.2, seed=1)
    assert {d.opening for d in train}.isdisjoint(d.opening for d in held_out)
    assert len({d.opening for d in held_out}) == 2
    assert (train, held_out) == hold_out([*dialogues, *dialogues[:5]], 0.2, seed=1)
    assert without_repeats([*dialogues, *dialogues[:5]]) == dialogues
    with pytest.raises(DialogueError, match="two different openings"):
        hold_out(dialogues[:1], 0.5, seed=0)


def test_each_answer_has_a_history_with_all_references():
    dialogues = [said("u:a", "a:b", "u:c", "a:d"), said("u:a", "a:x"), said("u:a", "a:b")]
    found = [(len(history.messages), history.references) for history in histories(dialogues)]
    assert found == [(1, ("b", "x")), (3, ("d",))]


# -- whose tokens

DIALOGUES = {
    "one turn": (said("u:what is rain", "a:rain is water"), ["rain is water<|end|>"]),
    "several turns": (said("u:rain", "a:water", "u:is it", "a:it is rain"), ["water<|end|>", "it is rain<|end|>"]),
    "with a system message": (said("s:be short", "u:rain", "a:water"), ["water<|end|>"]),
    "the assistant begins": (said("a:hello", "u:rain", "a:rain"), ["rain<|end|>"]),
    "the user says the answer": (said("u:water", "a:water"), ["water<|end|>"]),
    "an emoji of several tokens": (said("u:\N{GRINNING FACE}", "a:\N{GRINNING FACE}"), ["\N{GRINNING FACE}<|end|>"]),
}


@pytest.mark.parametrize("name", DIALOGUES)
def test_only_the_assistants_tokens_are_learned(tokenizer, name):
    """Token by token: the runs of learned tokens are the answers with what ends them, and nothing else."""
    dialogue, expected = DIALOGUES[name]
    encoded = encode(tokenizer, dialogue.messages)
    ids: list[int] = []
    for message in dialogue.messages:
        ids += tokenizer(f"<|{message['role']}|>" + message["content"] + "<|end|>")["input_ids"]
    assert list(encoded.ids) == ids
    runs: list[list[int]] = []
    for i, (token, is_answer) in enumerate(zip(encoded.ids, encoded.answers, strict=True)):
        if is_answer:
            if i == 0 or not encoded.answers[i - 1]:
                runs.append([])
            runs[-1].append(token)
    assert [tokenizer.decode(run) for run in runs] == expected
    last = encode(tokenizer, dialogue.messages, last_only=True)
    assert sum(last.answers) == len(runs[-1]) and all(last.answers[-len(runs[-1]) :])


def test_any_template_that_only_grows_will_do(tokenizer):
    """As ChatML has it: with a line break after each turn, and a default system message."""
    other = tokenizer_of(train_tokenizer([said("u:a", "a:b")], 280))
    other.chat_template = (
        "{%- if messages[0]['role'] != 'system' -%}{{- '[system]\nhelp\n' -}}{%- endif -%}"
        "{%- for m in messages -%}{{- '[' + m['role'] + ']\n' + m['content'] + '\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '[assistant]\n' -}}{%- endif -%}"
    )
    encoded = encode(other, said("u:rain", "a:water", "u:and", "a:no").messages)
    learned = [token for token, is_answer in zip(encoded.ids, encoded.answers, strict=True) if is_answer]
    assert other.decode(learned) == "water\nno\n"


def test_a_template_that_rewrites_the_past_is_refused(tokenizer):
    other = tokenizer_of(train_tokenizer([said("u:a", "a:b")], 280))
    other.chat_template = "{{- messages | length -}}" + other.chat_template
    with pytest.raises(DialogueError, match="writes the beginning of a dialogue in another way"):
        encode(other, said("u:rain", "a:water", "u:and", "a:no").messages)


def test_what_is_too_long_loses_its_beginning(tokenizer):
    encoded = [encode(tokenizer, said("u:what is rain", "a:rain is water").messages), Encoded((1, 2), (False, True))]
    (first, second), cut = shorten(encoded, 5)
    assert (first.ids, first.answers) == (encoded[0].ids[-5:], encoded[0].answers[-5:])
    assert second == encoded[1] and cut == 1
    prompt = encode_prompt(tokenizer, said("u:what is rain").messages, 4)
    assert tokenizer.decode(prompt).endswith("rain<|end|><|assistant|>") and len(prompt) == 4


# -- rows


def made(*lengths: int) -> list[Encoded]:
    """Dialogues of these lengths, of which all but the first two tokens are answers."""
    generator = torch.Generator().manual_seed(0)
    ids = [tuple(torch.randint(1, 40, (n,), generator=generator).tolist()) for n in lengths]
    return [Encoded(row, tuple(i >= 2 for i in range(len(row)))) for row in ids]


def test_rows_are_packed_without_loss_and_within_the_context():
    dialogues = made(5, 9, 3, 10, 2, 1, 7)
    rows = pack(dialogues, 10)
    assert [[len(d.ids) for d in row] for row in rows] == [[5, 3, 2], [9, 1], [10], [7]]
    assert {d for row in rows for d in row} == set(dialogues)
    assert Arrangement(10, packs=False).rows(dialogues) == [(d,) for d in dialogues]


def test_each_target_is_the_next_token_of_the_same_dialogue():
    rows = pack(made(5, 3, 4), 8)
    batch = collate(rows, pad=0)
    assert batch.input_ids.shape == (2, 8) and batch.attention_mask.shape == (2, 1, 8, 8)
    assert int((batch.targets != IGNORED).sum()) == valid_tokens(rows) == 3 + 1 + 2
    for i, row in enumerate(rows):
        start = 0
        for dialogue in row:
            for j, token in enumerate(dialogue.ids):
                is_last = j + 1 == len(dialogue.ids)
                expected = IGNORED if is_last or not dialogue.answers[j + 1] else dialogue.ids[j + 1]
                assert batch.input_ids[i, start + j] == token and batch.position_ids[i, start + j] == j
                assert batch.targets[i, start + j] == expected
            start += len(dialogue.ids)
        assert (batch.targets[i, start:] == IGNORED).all()


@pytest.mark.parametrize("kind", KINDS)
def test_packed_dialogues_do_not_see_each_other(kind):
    """Logits are those of each dialogue alone; another dialogue's tokens do not change a bit of them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=40, **KINDS[kind])).eval()
    dialogues = made(7, 5, 6)

    def logits(row: tuple[Encoded, ...]) -> torch.Tensor:
        batch = collate([row, (dialogues[2],)], pad=0)
        names = ("input_ids", "position_ids", "attention_mask")
        return model(**{name: getattr(batch, name) for name in names}, use_cache=False).logits[0]

    with torch.no_grad():
        packed, swapped = logits(tuple(dialogues)), logits((made(9, 7)[1], *dialogues[1:]))
        start = 0
        for dialogue in dialogues:
            alone = model(torch.tensor([dialogue.ids])).logits[0]
            torch.testing.assert_close(packed[start : start + len(dialogue.ids)], alone, rtol=1e-4, atol=1e-5)
            start += len(dialogue.ids)
    assert not torch.equal(packed[:7], swapped[:7])
    assert torch.equal(packed[7:], swapped[7:])


def test_rows_go_on_wherever_one_begins_to_read():
    dialogues = made(*range(3, 20))
    everything = Rows(dialogues, Arrangement(20, packs=True), "seed").take(0, 40)
    late = Rows(dialogues, Arrangement(20, packs=True), "seed")
    assert late.take(25, 15) == everything[25:]
    first_epoch = everything[: Rows(dialogues, Arrangement(20, packs=True), "seed").in_an_epoch()]
    assert everything != Rows(dialogues, Arrangement(20, packs=True), "other").take(0, 40)
    assert len(first_epoch) < 40


def test_the_repository_keeps_a_config_for_a_new_model():
    file = Path(__file__).parents[2] / "examples" / "configs" / "chat_model.json"
    assert AutoConfig.for_model(**json.loads(file.read_text())).model_type == "llama"
