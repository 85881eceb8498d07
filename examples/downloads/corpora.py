"""Corpora as they are published, made readable: tagged words, mails, conversations."""

from __future__ import annotations

import email
import email.header
import email.message
import html
import html.parser
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

Dialogue = tuple[str, ...]  # what the user and the assistant say in turn

_CLOSES = frozenset([".", ",", ";", ":", "!", "?", ")", "]", "}", "''", "%"])  # no space before
_OPENS = frozenset(["(", "[", "{", "``"])  # no space after
_TWICE = frozenset(["?", "!", ";", ":"])  # the Brown corpus has these as two words at the end of a sentence
_NO_TEXT = frozenset(("style", "script", "title", "head"))
_BREAKS = frozenset(("br", "p", "div", "tr", "table", "li", "ul", "ol", "hr", "center", "blockquote"))


# -- the Brown corpus


def brown_paragraphs(tagged: str) -> list[str]:
    """The paragraphs of one text of the Brown corpus, `word/tag word/tag ...`, as one would print them."""
    blocks = re.split(r"\n\s*\n", tagged)
    return [text for block in blocks if (text := detokenize([item.rpartition("/")[0] for item in block.split()]))]


def detokenize(words: Iterable[str]) -> str:
    """Joins words and marks into a line: ``in the mark '' ,`` becomes "in the mark",."""
    line, space, previous = "", False, ""
    for word in words:
        if word in _TWICE and word == previous:
            continue
        text = word.replace("``", '"').replace("''", '"')
        line += (" " if space and word not in _CLOSES else "") + text
        space, previous = word not in _OPENS, word
    return line.strip()


def interleave(texts: Mapping[str, str]) -> list[str]:
    """Texts named by genre and number (`ca01`), so that each genre is spread evenly from the first to the last.

    A tail that is held out is then of the same kind as the rest.
    """
    names = sorted(texts)
    genres = {genre: list(group) for genre, group in itertools.groupby(names, key=lambda name: name[:2])}
    place = {name: ((i + 0.5) / len(group), name) for group in genres.values() for i, name in enumerate(group)}
    return [texts[name] for name in sorted(names, key=place.__getitem__)]


# -- mails


def mail_text(raw: bytes) -> str:
    """Subject and body of a mail, decoded; of HTML what one sees.

    The other headers are left out: hosts and dates tell where a collection was made, and not what a mail is.
    """
    message = email.message_from_bytes(raw)
    subject = _decoded_header(message.get("Subject", ""))
    parts = [part for part in message.walk() if not part.is_multipart() and part.get_content_maintype() == "text"]
    plain = [_decoded_part(part) for part in parts if part.get_content_subtype() != "html"]
    body = "\n".join(text for text in plain if text.strip())
    if not body:
        body = "\n".join(seen_of_html(_decoded_part(part)) for part in parts if part.get_content_subtype() == "html")
    lines = [" ".join(line.split()) for line in f"{subject}\n\n{body}".replace("\0", " ").splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _decoded_header(value: object) -> str:
    words = []
    for part, charset in email.header.decode_header(str(value)):
        words.append(_decoded(part, charset) if isinstance(part, bytes) else part)
    return " ".join("".join(words).split())


def _decoded_part(part: email.message.Message) -> str:
    payload = part.get_payload(decode=True)
    return _decoded(payload, part.get_content_charset()) if isinstance(payload, bytes) else ""


def _decoded(data: bytes, charset: str | None) -> str:
    """Text in the charset that it names, in UTF-8, or in Latin-1, which has a character for every byte."""
    for name in (charset, "utf-8"):
        try:
            return data.decode(name or "utf-8")
        except (LookupError, UnicodeError, ValueError):
            continue
    return data.decode("latin-1")


class _Seen(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.text: list[str] = []
        self._hidden: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in _NO_TEXT:
            self._hidden.append(tag)
        elif tag == "body":
            self._hidden.clear()  # a head that nobody closed
        if tag in _BREAKS:
            self.text.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._hidden:
            del self._hidden[self._hidden.index(tag) :]

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text.append(data)


def seen_of_html(source: str) -> str:
    """The text of a page, without tags, styles and scripts."""
    parser = _Seen()
    try:
        parser.feed(source)
        parser.close()
    except (AssertionError, ValueError):  # a declaration that no browser would read either
        return html.unescape(re.sub(r"<[^>]*>", " ", source))
    return "".join(parser.text)


# -- conversations


def dialogues(topics: Iterable[Mapping[str, Any]]) -> list[Dialogue]:
    """The conversations of some topics, each once, in their order; every one ends with an answer."""
    found: dict[Dialogue, None] = {}
    for topic in topics:
        for turns in topic.get("conversations") or ():
            said = [" ".join(str(turn).split()) for turn in turns or ()]
            said = said[: len(said) // 2 * 2]
            if said and all(said):
                found[tuple(said)] = None
    return list(found)


def as_messages(dialogue: Dialogue) -> dict[str, list[dict[str, str]]]:
    """{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}."""
    roles = itertools.cycle(("user", "assistant"))
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, dialogue, strict=False)]}
