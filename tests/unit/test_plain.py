"""Small states as JSON: everything that is taken comes back; the rest is refused by its path."""

from __future__ import annotations

import enum
import json
import math
from collections import Counter, OrderedDict
from http import HTTPStatus
from typing import Any

import numpy as np
import pytest
import torch
from partita.model import from_plain, to_plain


class Phase(enum.IntEnum):
    FIRST = 1


class Name(str):
    pass


GENERATOR = np.random.default_rng(3).bit_generator.state  # 128-bit integers
SAME: list[Any] = [
    None,
    True,
    -3,
    2**63 - 1,
    -(2**63),
    2**63,
    -(2**200),
    10**5000,
    0.1,
    -0.0,
    math.inf,
    -math.inf,
    "text \u00e9",
    b"\x00\xff",
    (1, (2, [3])),
    {"a": {"b": [1, 2]}},
    {1: "one", (2, 3): "pair", None: 0},
    {"tuple": 1},
    {"float": {"int": "0x3"}},
    Counter("abca"),
    GENERATOR,
]


@pytest.mark.parametrize("value", SAME, ids=[str(i) for i in range(len(SAME))])
def test_what_is_taken_comes_back(value):
    again = from_plain(json.loads(json.dumps(to_plain(value, "x"), allow_nan=False)))
    assert again == value and type(again) is type(value)
    assert math.copysign(1, again) == math.copysign(1, value) if value == 0.0 and isinstance(value, float) else True


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Phase.FIRST, 1),
        (HTTPStatus.OK, 200),
        (Name("n"), "n"),
        (np.float64(0.5), 0.5),
        (np.float32(0.5), 0.5),
        (np.int16(3), 3),
        (np.bool_(True), True),
        (np.str_("s"), "s"),
        (OrderedDict(a=1), {"a": 1}),
    ],
    ids=str,
)
def test_subclasses_become_what_they_derive_from(value, plain):
    again = from_plain(json.loads(json.dumps(to_plain(value, "x"), allow_nan=False)))
    assert again == plain and type(again) is type(plain)


@pytest.mark.parametrize("value", [np.float64("inf"), np.float64("-inf"), np.float32("nan")], ids=str)
def test_numbers_of_numpy_that_are_not_finite(value):
    again = from_plain(json.loads(json.dumps(to_plain({"best": value}, "x"), allow_nan=False)))["best"]
    assert type(again) is float
    assert np.array_equal(again, float(value), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)], ids=str)
def test_tensors_come_back(dtype, shape):
    value = torch.ones(shape, dtype=dtype).transpose(0, -1) if len(shape) == 2 else torch.ones(shape, dtype=dtype)
    again = from_plain(json.loads(json.dumps(to_plain(value, "x"))))
    assert again.dtype == dtype and again.shape == value.shape and torch.equal(again, value)


def _circle() -> list[Any]:
    circle: list[Any] = []
    circle.append(circle)
    return circle


def _deep() -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(200):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": [1, {2}]}, r"x\.a\[1\] is a set"),
        ({"a": np.ones(2)}, r"x\.a is a ndarray.*torch\.from_numpy"),
        ((1, 2j), r"x\[1\] is a complex"),
        ([torch.ones(2).to_sparse()], r"x\[0\] is a tensor that cannot be saved"),
        ([torch.ones(2, device="meta")], r"x\[0\] is a tensor that cannot be saved"),
        (np.longdouble(1), r"x is a longdouble"),
        (_circle(), r"x\[0\].* is nested deeper"),
        (_deep(), r"x\.a\.a.* is nested deeper"),
    ],
    ids=range(8),
)
def test_what_cannot_be_saved_is_named(value, words):
    with pytest.raises((TypeError, ValueError), match=words):
        to_plain(value, "x")
