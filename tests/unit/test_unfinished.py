"""A training that ends in mid-accumulation: one warning, unless something else has ended it."""

from __future__ import annotations

import logging

import partita
import pytest
from support import base_config, global_batch, make_model


def _trained(micro_batches: int) -> partita.Engine:
    engine = partita.Engine(make_model(), config=base_config(gradient_accumulation_steps=2))
    for step in range(micro_batches):
        engine.backward(engine(*global_batch(step, 2)))
        engine.step()
    return engine


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "mid-accum" in r.getMessage()]


def test_destroy_and_forgetting_the_engine_warn_once(caplog):
    """With the numbers, and the key."""
    engine = _trained(3)
    engine.destroy()
    engine.destroy()
    del engine
    (message,) = _warnings(caplog)
    assert "1 micro-batch(es)" in message and "every 2 (gradient_accumulation_steps)" in message


def test_no_warning_where_nothing_is_lost_unnoticed(caplog):
    """A whole step; gradients that were dropped; boundaries by hand; an error."""
    _trained(2).destroy()
    dropped = _trained(3)
    dropped.zero_grad()
    dropped.destroy()
    by_hand = _trained(1)
    by_hand.set_gradient_accumulation_boundary(True)
    by_hand.destroy()
    failed = _trained(1)
    with pytest.raises(ZeroDivisionError):
        try:
            raise ZeroDivisionError
        finally:
            failed.destroy()
    assert _warnings(caplog) == []
