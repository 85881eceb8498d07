"""The digest of what a step is taken with follows every change of it, also those in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from partita.optim import StepDigest
from torch.optim import Optimizer


class Tuned(Optimizer):
    """Has hyper-parameters of several kinds."""

    def __init__(self, params: Any) -> None:
        betas, weights, scale = (0.9, 0.5), [0.1, 0.2], torch.tensor(0.5, device="cpu")
        super().__init__(params, {"lr": 0.1, "betas": betas, "weights": weights, "scale": scale, "on": False})

    def step(self, closure: Any = None) -> None:
        raise NotImplementedError


def optimizer() -> Tuned:
    groups = [{"params": [torch.nn.Parameter(torch.ones(2, device="cpu"))]} for _ in range(2)]
    for group in groups:  # not one list and one tensor for both
        group |= {"weights": [0.1, 0.2], "scale": torch.tensor(0.5, device="cpu")}
    return Tuned(groups)


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a number": lambda group: group.update(lr=0.2),
    "a tuple": lambda group: group.update(betas=(0.9, 0.6)),
    "a list in place": lambda group: group["weights"].append(0.3),
    "a tensor in place": lambda group: group["scale"].mul_(2),
    "a key that disappears": lambda group: group.pop("on"),
    "a flag": lambda group: group.update(on=True),
    "a list in a tuple": lambda group: group.update(betas=([0.9], 0.5)),
}


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_seen_and_only_a_change(name, index):
    ours, theirs = optimizer(), optimizer()
    digest, other = StepDigest(ours), StepDigest(theirs)
    first = digest.take(1, [])
    assert digest.take(1, []) == first == other.take(1, [])
    CHANGES[name](ours.param_groups[index])
    changed = digest.take(1, [])
    assert changed != first
    assert digest.take(1, []) == changed
    CHANGES[name](theirs.param_groups[index])
    assert other.take(1, []) == changed == StepDigest(theirs).take(1, [])


def test_a_list_inside_a_tuple_may_change_in_place():
    ours = optimizer()
    ours.param_groups[0]["betas"] = ([0.9], 0.5)
    digest = StepDigest(ours)
    first = digest.take(1, [])
    ours.param_groups[0]["betas"][0].append(0.1)
    assert digest.take(1, []) != first


def test_micro_batches_and_frozen_parameters_count():
    digest = StepDigest(optimizer())
    seen = [digest.take(1, []), digest.take(2, []), digest.take(2, ["a"]), digest.take(2, ["b"]), digest.take(1, ["a"])]
    assert len(set(seen)) == len(seen)
    assert digest.take(1, []) == seen[0]


def test_a_group_that_is_added_counts():
    ours = optimizer()
    digest = StepDigest(ours)
    first = digest.take(1, [])
    ours.add_param_group({"params": [torch.nn.Parameter(torch.ones(1, device="cpu"))]})
    assert digest.take(1, []) != first
