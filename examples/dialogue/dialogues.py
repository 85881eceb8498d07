"""Dialogues: read from JSON lines, divided, and turned into tokens of which the assistant's are known.

A dialogue is a list of messages, each with a role (system, user or assistant) and a content, as chat templates take it.
An answer is a message of the assistant that follows another message; one that opens a dialogue is only read.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.job import JobError

ROLES = ("system", "user", "assistant")
# Each turn begins with a token for its role and ends with one for its end; what a tokenizer without a template gets.
DEFAULT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
TEMPLATE_TOKENS = (*(f"<|{role}|>" for role in ROLES), "<|end|>")

Message = dict[str, str]


class DialogueError(JobError):
    """A dialogue cannot be used; the message says which."""


@dataclass(frozen=True)
class Dialogue:
    """Messages up to the last one of the assistant."""

    messages: tuple[Message, ...]

    @property
    def key(self) -> str:
        return as_key(self.messages)

    @property
    def opening(self) -> str:
        """What comes before the first answer, in lower case: what makes two dialogues the same for a held-out part."""
        return as_key(self.messages[: answer_places(self.messages)[0]]).lower()


@dataclass(frozen=True)
class History:
    """Messages before an answer of the assistant, and what the data answer there."""

    messages: tuple[Message, ...]
    references: tuple[str, ...]


@dataclass(frozen=True)
class Encoded:
    """Tokens of a dialogue; `answers[i]`: whether token i is to be learned."""

    ids: tuple[int, ...]
    answers: tuple[bool, ...]


def answer_places(messages: Sequence[Message]) -> list[int]:
    return [i for i, message in enumerate(messages) if i and message["role"] == "assistant"]


def as_key(messages: Iterable[Message]) -> str:
    return json.dumps([[message["role"], message["content"]] for message in messages], ensure_ascii=False)


# -- files


def read_dialogues(file: Path) -> list[Dialogue]:
    """Reads JSON lines: {"messages": [{"role": ..., "content": ...}, ...]}, empty lines skipped.

    Raises:
        DialogueError: the file is not there or empty, or a line is no dialogue; names file and line.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DialogueError(
            f"cannot read the dialogues {file}: {why} (`make data` makes data/dialogues.jsonl)"
        ) from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise DialogueError(f"{file} is empty: it needs one dialogue in each line")
    return [parse_dialogue(line, f"{file}:{number}") for number, line in lines]


def parse_dialogue(line: str, place: str) -> Dialogue:
    """One line; `place` stands before the message of a `DialogueError`."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DialogueError(f"{place}: not JSON: {error}") from None
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages:
        raise DialogueError(f'{place}: a line is {{"messages": [...]}} with at least one message')
    checked = [_message(message, f"{place}: message {number}") for number, message in enumerate(messages, 1)]
    while checked and checked[-1]["role"] != "assistant":
        checked.pop()  # nobody answers it
    if not answer_places(checked):
        raise DialogueError(f"{place}: no message of the role 'assistant' follows another: there is nothing to learn")
    return Dialogue(tuple(checked))


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise DialogueError(f"{place} is no object with a role and a content")
    for name in ("role", "content"):
        if not isinstance(value.get(name), str):
            raise DialogueError(f"{place} has no {name} that is a text")
    if value["role"] not in ROLES:
        raise DialogueError(f"{place} has the unknown role {value['role']!r}: there are {', '.join(ROLES)}")
    if value["role"] == "assistant" and not value["content"].strip():
        raise DialogueError(f"{place}: the assistant's content is empty")
    return {"role": value["role"], "content": value["content"]}


# -- which are trained on


def without_repeats(dialogues: Iterable[Dialogue]) -> list[Dialogue]:
    """Each dialogue once, where it stands first."""
    return list({dialogue.key: dialogue for dialogue in dialogues}.values())


def hold_out(dialogues: Sequence[Dialogue], share: float, seed: int) -> tuple[list[Dialogue], list[Dialogue]]:
    """(training, held-out) dialogues. Those with the same opening stay together: no held-out question is trained on.

    Args:
        share: of the openings that are held out; at least one is on each side.

    Raises:
        DialogueError: there are fewer than two openings.
    """
    openings = sorted({dialogue.opening for dialogue in dialogues})
    if len(openings) < 2:
        raise DialogueError("the dialogues need at least two different openings: one is held out")
    random.Random(seed).shuffle(openings)
    held = set(openings[: min(max(1, round(share * len(openings))), len(openings) - 1)])
    sides = ([d for d in dialogues if d.opening not in held], [d for d in dialogues if d.opening in held])
    return sides


def histories(dialogues: Iterable[Dialogue]) -> list[History]:
    """What comes before each answer of the assistant, once, with all answers that the dialogues give there."""
    found: dict[str, tuple[tuple[Message, ...], dict[str, None]]] = {}
    for dialogue in dialogues:
        for i in answer_places(dialogue.messages):
            before = dialogue.messages[:i]
            found.setdefault(as_key(before), (before, {}))[1][dialogue.messages[i]["content"]] = None
    return [History(messages, tuple(references)) for messages, references in found.values()]


# -- tokens


def render(tokenizer: Any, messages: Sequence[Message], *, answers_next: bool = False) -> str:
    """The messages as the tokenizer's chat template writes them; `answers_next`: with the beginning of an answer."""
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answers_next)
    except Exception as error:  # jinja's, of a template that refuses the order of roles
        raise DialogueError(f"the tokenizer's chat template cannot write {as_key(messages)[:200]}: {error}") from None
    return str(text)


def answer_spans(tokenizer: Any, messages: Sequence[Message], *, last_only: bool = False) -> list[tuple[int, int]]:
    """Where in the rendered text the answers are, with what ends each turn: (first, end) characters.

    Raises:
        DialogueError: the template writes a beginning in another way than in the whole dialogue.
    """
    whole, spans = render(tokenizer, messages), []
    for i in answer_places(messages):
        if last_only and i < len(messages) - 1:
            continue
        before = render(tokenizer, messages[:i], answers_next=True)
        after = render(tokenizer, messages[: i + 1])
        if not (after.startswith(before) and whole.startswith(after)):
            raise DialogueError(
                "the tokenizer's chat template writes the beginning of a dialogue in another way once it goes on, so "
                "the assistant's tokens cannot be told; set another tokenizer.chat_template"
            )
        spans.append((len(before), len(after)))
    return spans


def encode(tokenizer: Any, messages: Sequence[Message], *, last_only: bool = False) -> Encoded:
    """Tokens of a dialogue, and which of them are the assistant's (`last_only`: only those of the last message)."""
    spans = answer_spans(tokenizer, messages, last_only=last_only)
    tokens = tokenizer(render(tokenizer, messages), add_special_tokens=False, return_offsets_mapping=True)
    answers = tuple(any(first <= start < end for first, end in spans) for start, _ in tokens["offset_mapping"])
    return Encoded(tuple(tokens["input_ids"]), answers)


def encode_prompt(tokenizer: Any, messages: Sequence[Message], longest: int) -> tuple[int, ...]:
    """Tokens that an answer follows; the last `longest` of them."""
    text = render(tokenizer, messages, answers_next=True)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"][-longest:])


def shorten(encoded: Iterable[Encoded], longest: int) -> tuple[list[Encoded], int]:
    """Dialogues of at most `longest` tokens, cut off at their beginning; how many were too long."""
    kept = list(encoded)
    too_long = sum(len(dialogue.ids) > longest for dialogue in kept)
    return [Encoded(dialogue.ids[-longest:], dialogue.answers[-longest:]) for dialogue in kept], too_long
