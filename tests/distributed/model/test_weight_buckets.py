"""engine.weights(): all weights in buckets of bounded size, in every stage, and what may happen between two buckets."""

from __future__ import annotations

from typing import Any

import partita
import pytest
from blocks_model import TRANSPORTS, assert_same_weights, config_for, error_of, take_step
from test_save_model import Exported, make

STAGES = (0, 1, 2, 3)


def _feeds_a_copy(stage: int, over: str, precision: str, bucket_bytes: int) -> None:
    engine = partita.Engine(model=make(), config=config_for(stage, over, precision))
    take_step(engine, 0)
    expected = engine.module_state_dict()
    given: dict[str, Any] = {}
    buckets = 0
    for bucket in engine.weights(bucket_bytes):
        buckets += 1
        storages = {value.untyped_storage()._cdata: value.nbytes for _, value in bucket}
        assert sum(storages.values()) <= bucket_bytes or len(storages) == 1
        for name, value in bucket:
            assert name not in given
            given[name] = value.clone()
        for _, value in bucket:
            value.zero_()  # it is the program's
    assert (buckets == 1) == (bucket_bytes > 10**6)
    assert_same_weights(given, expected, "in the buckets")
    copy = Exported().to(given["large"].dtype)
    copy.load_state_dict(given)
    assert_same_weights(engine.module_state_dict(), expected, "afterwards")
    take_step(engine, 1)
    engine.destroy()


@pytest.mark.pairwise
@pytest.mark.parametrize("bucket_bytes", [1, 6000, 10**7])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("over", TRANSPORTS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_copy_is_fed(ranks, stage, over, precision, bucket_bytes):
    ranks(2).run(_feeds_a_copy, stage, over, precision, bucket_bytes)


def _left_early(stage: int, over: str) -> None:
    """All ranks leave the loop; the engine computes between two buckets, and goes on."""
    engine = partita.Engine(model=make(), config=config_for(stage, over))
    for bucket in engine.weights(1):
        if bucket[0][0] == "body.norm.bias":
            break
    take_step(engine, 0)
    buckets = engine.weights(1)
    next(buckets)
    buckets.close()
    with pytest.raises(ValueError, match=r"bucket_bytes=0"):
        engine.weights(0)
    waiting = engine.weights(1)
    next(waiting)
    take_step(engine, 1)
    assert "began at step 1, and the engine is at step 2" in error_of(lambda: next(waiting))
    engine.destroy()
    assert "after engine.destroy()" in error_of(lambda: engine.weights())


@pytest.mark.parametrize("over", TRANSPORTS)
@pytest.mark.parametrize("stage", [0, 3])
def test_the_loop_may_be_left(ranks, stage, over):
    ranks(2).run(_left_early, stage, over)
