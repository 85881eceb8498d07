"""Payloads of stages: described in a header, packed into one message, and taken apart again."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from partita.pipeline.payload import (
    HEADER_BYTES,
    classes_of,
    fill,
    form_of_header,
    message_bytes,
    room_for,
    room_in,
    taken_apart,
    tensors_in,
)
from torch import Tensor
from torch.utils import _pytree as pytree

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.uint8)


def sent(payload: Any) -> Any:
    """What the other side gets."""
    form, tensors = taken_apart(payload)
    there = form_of_header(form.to_header())
    assert there == form
    if not tensors:
        return there.put_together([])
    message = room_in(torch.empty(message_bytes(form.tensors) + 7, dtype=torch.uint8), form.tensors)
    fill(message, form.tensors, tensors)
    room = room_for(there.tensors, torch.device("cpu"))
    assert (message.dtype, message.shape) == (room.dtype, room.shape)
    return there.put_together(tensors_in(room.copy_(message), there.tensors))


def same(ours: Any, theirs: Any) -> bool:
    a, structure = pytree.tree_flatten(ours)
    b, other = pytree.tree_flatten(theirs)
    equal = (
        torch.equal(x, y) and x.dtype == y.dtype and x.shape == y.shape
        if isinstance(x, Tensor)
        else (x, type(x)) == (y, type(y))
        for x, y in zip(a, b, strict=True)
    )
    return structure == other and all(equal)


tensors = st.builds(
    lambda dtype, shape, seed: torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
    st.integers(0, 9),
)
leaves = tensors | st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text(max_size=4)
payloads = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=2).map(OrderedDict)
    ),
    max_leaves=8,
)


@given(payloads)
def test_a_payload_arrives_as_it_was(payload):
    assert same(sent(payload), payload)


def test_views_arrive_as_their_values():
    whole = torch.arange(24.0).view(4, 6)
    payload = (whole.t(), whole[1:3, ::2], whole[:, :0], whole[0, 0], whole[:1].expand(3, 6))
    assert same(sent(payload), payload)


def test_what_needs_gradients_is_said():
    x = torch.ones(2, requires_grad=True)
    form, _ = taken_apart({"a": x * 2, "b": torch.ones(3), "c": x})
    assert [leaf.shape for leaf in form_of_header(form.to_header()).gradients] == [(2,), (2,)]


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (object(), "hands on a object"),
        ([torch.ones(1), {1, 2}], "hands on a set"),
        (torch.float32, "hands on a dtype"),
        (1 + 2j, "hands on a complex"),
    ],
)
def test_what_cannot_be_handed_on_is_named(payload, says):
    with pytest.raises(TypeError, match=says):
        taken_apart(payload)


def test_a_description_has_bounds():
    form, _ = taken_apart([torch.ones(1)] * HEADER_BYTES)
    with pytest.raises(ValueError, match="put several tensors into one"):
        form.to_header()


def test_classes_are_shapes_of_inputs():
    one, two = torch.zeros(2, 3), torch.zeros(2, 4)
    assert classes_of([one, one + 1, two, one.long(), two, (one, two), (one, two)]) == [0, 0, 1, 2, 1, 3, 3]


def test_keys_that_would_come_back_as_something_else_are_refused():
    form, _ = taken_apart({(0, 1): torch.ones(2)})
    with pytest.raises(TypeError, match="keys of dicts are texts or numbers"):
        form.to_header()


def test_sparse_tensors_are_refused():
    with pytest.raises(TypeError, match=r"layout torch.sparse_coo.*to_dense"):
        taken_apart(torch.eye(3).to_sparse())


def test_shapes_in_mappings_inside_of_tuples_count():
    inputs = [(UserDict(ids=torch.ones(n)), {"deep": [UserDict(mask=torch.ones(2))]}) for n in (3, 3, 4)]
    assert classes_of(inputs) == [0, 0, 1]
