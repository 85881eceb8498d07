"""Labels that two ranks read: told apart where they differ, and not where they say nothing or are rounded otherwise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from partita.pipeline import fingerprint, require_same_labels
from partita.pipeline.same_labels import NOTHING


@given(st.integers(0, 10_000), st.sampled_from([torch.int64, torch.float32, torch.bfloat16]))
def test_another_order_is_noticed_within_three_steps(seed, dtype):
    generator = torch.Generator().manual_seed(seed)

    def differs() -> bool:
        labels = torch.randint(100, (4, 50), generator=generator).to(dtype)
        order = torch.randperm(200, generator=generator)
        try:
            require_same_labels(fingerprint(list(labels)), fingerprint(list(labels.view(-1)[order].view(4, 50))))
        except ValueError:
            return True
        return False

    assert any(differs() for _ in range(3))


def test_rounding_is_no_difference():
    labels = torch.randn(3, 2000, generator=torch.Generator().manual_seed(0))
    require_same_labels(fingerprint([labels]), fingerprint([labels.bfloat16()]))


@pytest.mark.parametrize(
    "labels",
    [None, [], torch.zeros(3), torch.empty(0), torch.full((2,), torch.inf), torch.tensor([1.0, torch.nan])],
)
def test_what_stands_for_labels_is_compared_with_nothing(labels):
    assert fingerprint([labels]) == NOTHING
    require_same_labels(NOTHING, fingerprint([torch.arange(3)]))


def test_labels_in_dicts_count():
    assert fingerprint([{"a": torch.arange(3)}]) == fingerprint([torch.arange(3)]) != fingerprint([torch.arange(4)])


def test_no_sum_is_as_small_as_that_of_nothing():
    many = [torch.randn(5000, generator=torch.Generator().manual_seed(i)) for i in range(64)]
    assert fingerprint(many) > 50
