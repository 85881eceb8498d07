"""units/lifetimes.py over a group of one: the hooks, and what they keep alive."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from gathered_alone import gathered, two_blocks
from partita.units import AbsentParameterError, holder_of


def test_hooks_bring_a_block_for_its_forward_and_its_backward():
    model = two_blocks()
    lifetimes = gathered(model)
    x = torch.ones(1, 3, requires_grad=True)
    loss = model(x).sum()
    assert lifetimes.gathered_bytes == 0
    loss.backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    lifetimes.end_backward()
    assert lifetimes.gathered_bytes == 0


def test_the_hooks_of_a_model_do_not_keep_the_lifetimes_alive():
    """A model may outlive its engine: its hooks do nothing then, and its parameters say that their engine is gone."""
    model = two_blocks()
    lifetimes = gathered(model)
    loss = model(torch.ones(1, 3)).sum()  # with hooks on its outputs, too
    alive, unit = weakref.ref(lifetimes), weakref.ref(lifetimes.groups[0].units[0])
    del lifetimes
    gc.collect()
    assert alive() is None
    assert unit() is None
    assert all(holder_of(p) is None for p in model.parameters())
    with pytest.raises(AbsentParameterError, match="of an engine that is gone"):
        model(torch.ones(1, 3))
    with pytest.raises(RuntimeError):  # torch: the saved parameters have no memory
        loss.backward()


def test_closed_lifetimes_leave_no_hook():
    model = two_blocks()
    lifetimes = gathered(model)
    lifetimes.close()
    hooks = [h for m in model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    assert hooks == []
