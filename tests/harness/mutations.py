"""Damage and malice for files of JSON: each function changes a text in one way, with a generator of its own choice."""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random

NUMBERS = [
    "-1",
    "0",
    "1",
    "7",
    "1.0",
    "1e2",
    "-0",
    "1e999",
    "NaN",
    "Infinity",
    "-Infinity",
    "true",
    "null",
    '"1"',
    "[]",
]
NUMBERS += [str(2**power + step) for power in (31, 53, 60, 63, 64, 128) for step in (-1, 0)]
NUMBERS += ["9" * 5000, "1." + "3" * 5000]
NAMES = [
    "",
    ".",
    "..",
    "/",
    "../x",
    "../../etc/passwd",
    "/etc/passwd",
    "a/b",
    "~",
    "a b",
    "__metadata__",
    "manifest.json",
]
NAMES += [r"a\\b", r"\u0000", r"a\u0000b", r"\n", r"\u001b[2J", r"\u007f", r"\ud800", r"\udfff\ud800"]
NAMES += ["manifest.json", "x" * 300, "\u00e9" * 200]
BAD_UTF8 = [b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\x80", b"\xe2\x82", b"\x00", b"\xef\xbb\xbf"]

_NUMBER = re.compile(rb"(?<=[:\[,\s])-?\d+(?=[,\]}\s])")
_STRING = re.compile(rb'"[^"\\]*"')
_KEY = re.compile(rb'"[^"\\]*"\s*:')


def _place(random: Random, pattern: re.Pattern[bytes], text: bytes) -> re.Match[bytes]:
    return random.choice(list(pattern.finditer(text)))


def _instead(found: re.Match[bytes], text: bytes, other: bytes) -> bytes:
    return text[: found.start()] + other + text[found.end() :]


def flip_bits(random: Random, text: bytes) -> bytes:
    changed = bytearray(text)
    for _ in range(random.choice((1, 1, 2, 8))):
        changed[random.randrange(len(text))] ^= 1 << random.randrange(8)
    return bytes(changed)


def other_bytes(random: Random, text: bytes) -> bytes:
    at = random.randrange(len(text) + 1)
    return text[:at] + random.randbytes(random.choice((1, 2, 9))) + text[at + random.choice((0, 1, 9)) :]


def truncate(random: Random, text: bytes) -> bytes:
    return text[: random.randrange(len(text))]


def move_a_piece(random: Random, text: bytes) -> bytes:
    """A piece of the text is missing, stands twice, or stands somewhere else."""
    begin, end, at = sorted(random.randrange(len(text) + 1) for _ in range(3))
    return text[:begin] + random.choice((b"", text[begin:end] * 2, text[end:at] + text[begin:end])) + text[at:]


def swap_numbers(random: Random, text: bytes) -> bytes:
    first, second = sorted((_place(random, _NUMBER, text) for _ in range(2)), key=lambda found: found.start())
    if first.start() == second.start():
        return text
    middle = text[first.end() : second.start()]
    return text[: first.start()] + second[0] + middle + first[0] + text[second.end() :]


def other_number(random: Random, text: bytes) -> bytes:
    return _instead(_place(random, _NUMBER, text), text, random.choice(NUMBERS).encode())


def near_number(random: Random, text: bytes) -> bytes:
    found = _place(random, _NUMBER, text)
    return _instead(found, text, b"%d" % (int(found[0]) + random.choice((-8, -1, 1, 8))))


def other_name(random: Random, text: bytes) -> bytes:
    return _instead(_place(random, _STRING, text), text, f'"{random.choice(NAMES)}"'.encode())


def repeat_a_key(random: Random, text: bytes) -> bytes:
    found = _place(random, _KEY, text)
    return _instead(found, text, found[0] + random.choice((b"1", b"{}", b'"x"')) + b"," + found[0])


def another_key(random: Random, text: bytes) -> bytes:
    """A key becomes another one, which may be there already."""
    return _instead(_place(random, _KEY, text), text, _place(random, _KEY, text)[0])


def nest(random: Random, text: bytes) -> bytes:
    depth = random.choice((2, 90, 99, 101, 900, 5000, 50_000))
    opening, closing = random.choice(((b"[", b"]"), (b'{"a":', b"}")))
    closings = closing * random.choice((depth, depth, 0))
    return _instead(_place(random, _NUMBER, text), text, opening * depth + b"1" + closings)


def not_unicode(random: Random, text: bytes) -> bytes:
    if random.random() < 0.1:
        return text.decode().encode(random.choice(("utf-16", "utf-32", "utf-8-sig", "utf-7")))
    at = random.randrange(len(text) + 1)
    return text[:at] + random.choice(BAD_UTF8) + text[at:]


def white_space(random: Random, text: bytes) -> bytes:
    at = random.randrange(len(text) + 1)
    return text[:at] + random.choice((b" ", b"\n", b"\t", b"\r\n", b" " * 99)) + text[at:]


MUTATIONS: list[Callable[[Random, bytes], bytes]] = [
    flip_bits,
    other_bytes,
    truncate,
    move_a_piece,
    swap_numbers,
    other_number,
    near_number,
    other_name,
    repeat_a_key,
    another_key,
    nest,
    not_unicode,
    white_space,
]
