"""What trains with mapped parameters trains with gathered ones: the models of the tests of gradients, over both."""

from __future__ import annotations

from typing import Any

import pytest
from gradient_models import ZOO
from reference import PRECISIONS, Outcome, sgd_config, train_in_engine


def _runs(over: str, precision: str, changes: dict[str, Any]) -> dict[str, Outcome]:
    """Of each model; one job for all."""
    config = sgd_config(
        stage=3,
        reduce_bucket_size=31,
        comm={"transport": over, "timeout_seconds": 30},
        **changes,
        **PRECISIONS[precision],
    )
    return {name: train_in_engine(training, config) for name, training in ZOO.items()}


@pytest.mark.parametrize(
    ("precision", "changes"),
    [("fp32", {"gradient_accumulation_steps": 2}), ("bf16", {"overlap_comm": False}), ("fp16", {})],
)
def test_gathered_parameters_train_as_mapped_ones(ranks, precision, changes):
    """Bit for bit; norms are sums in another order, as units are cut otherwise."""
    mapped, gathered = (ranks(2).run(_runs, over, precision, changes) for over in ("shared_memory", "torch"))
    for ours, theirs in zip(gathered, mapped, strict=True):
        for name, outcome in theirs.items():
            assert ours[name].norms == pytest.approx(outcome.norms, rel=1e-9), name
            assert outcome.weights.keys() == ours[name].weights.keys()
            for parameter, value in outcome.weights.items():
                assert ours[name].weights[parameter].equal(value), f"{parameter} of {name}"
