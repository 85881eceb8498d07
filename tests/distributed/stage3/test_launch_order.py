"""Gathers and reductions have communicators of their own, and cannot wait for each other: all ranks launch both in one
order, whatever each rank uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import partita
import pytest
from blocks_model import batch_of, config_for, make_blocks
from late_streams import on_late_streams
from launch_order import Record, circle_of, first_difference, noting_order
from partita.comm import CommunicationError
from test_stage3_models import AroundBlocks, _make
from torch import Tensor, nn

Orders = Callable[[int, int], list[int]]  # of blocks, by step and rank


def all_blocks(_step: int, _rank: int) -> list[int]:
    return [0, 1, 2, 3]


def other_blocks_on_each_rank(step: int, rank: int) -> list[int]:
    """In the order of the model; none of them, and all of them, too."""
    return [i for i in range(4) if (i + step + rank) % 3 or step == rank == 2] if step != rank + 1 else []


def not_as_registered(_step: int, _rank: int) -> list[int]:
    return [2, 0, 3, 1]


def another_in_each_step(step: int, _rank: int) -> list[int]:
    return [[3, 1, 0, 2], [0, 1, 2, 3], [1, 0, 1]][step]


class PartlyUsed(AroundBlocks):
    """Leaves most of its parameters without gradients when told to."""

    leaves_out = False

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(x) * self.scale if self.leaves_out else super().forward(x)


def _trained(orders: Orders, checkpoints: bool | None, freezes: str, config: dict[str, Any], late: bool) -> Record:
    def run() -> None:
        engine = partita.Engine(model=_make(PartlyUsed, checkpoints, freezes), config=config)
        micro_batches = engine.gradient_accumulation_steps()
        for step in range(3):
            for m in range(micro_batches):
                order = orders((step + m) % 3, engine.global_rank)
                engine.module.body.order = order or ([2] if freezes else [])  # type: ignore[union-attr]
                for i, block in enumerate(engine.module.body.blocks):  # type: ignore[union-attr,arg-type]
                    block.leaves_out = orders is other_blocks_on_each_rank and not (i + step + engine.global_rank) % 2
                engine.backward(engine(*batch_of(7 * step + m, engine.global_rank)))
                engine.step()
            engine.eval_batch(batch_of(50, engine.global_rank))
        engine.destroy()

    with noting_order() as record:
        if late:
            with on_late_streams():
                run()
        else:
            run()
    return record


ZERO: dict[str, dict[str, Any]] = {
    "one at a time": {"stage3_max_live_parameters": 1},
    "the next": {"stage3_prefetch_bucket_size": 0},
    "two": {"stage3_prefetch_bucket_size": 500},
    "all": {"stage3_prefetch_bucket_size": 10**9},
    "no overlap": {"overlap_comm": False},
    "offloaded": {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}},
    "persistent": {"stage3_param_persistence_threshold": 15, "overlap_gather": True},
}


def _assert_no_circle(records: list[Record]) -> None:
    gathers, reductions = ({key for r in records for key in r.launches() if name in key} for name in GATHER_REDUCE)
    assert gathers and reductions
    assert first_difference(records) is None
    assert circle_of(records) is None


GATHER_REDUCE = ("2 of [0, 1", "reduce_scatter")
SAMPLED = ("one at a time", "two", "no overlap", "offloaded")  # the others run with the long tests


@pytest.mark.pairwise
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("freezes", ["", "first blocks"])
@pytest.mark.parametrize("checkpoints", [None, False, True])
@pytest.mark.parametrize("zero", [pytest.param(z, marks=[] if z in SAMPLED else pytest.mark.slow) for z in ZERO])
@pytest.mark.parametrize("orders", [all_blocks, other_blocks_on_each_rank, not_as_registered, another_in_each_step])
def test_all_ranks_launch_in_one_order(ranks, orders, zero, checkpoints, freezes, late):
    """Whether ranks use the same blocks or others, with any prefetch, in first and later steps."""
    if checkpoints and (freezes or orders is another_in_each_step):
        pytest.skip("torch refuses the first, and the engine a block that fires more often than ever before")
    settings = config_for(3, "torch", zero=ZERO[zero], gradient_accumulation_steps=2 if late else 1)
    _assert_no_circle(ranks(2).run(_trained, orders, checkpoints, freezes, settings, late))


def _with_inputs_that_require_gradients(trains_head: bool) -> nn.Module:
    """Backwards go on through frozen blocks when all trained parameters have their gradients, the root's too."""
    model = _make(AroundBlocks, None, "first blocks")
    model.head.weight = nn.Parameter(model.head.weight.detach().clone(), requires_grad=trains_head)
    model.body.scale.requires_grad_(False)  # type: ignore[union-attr,operator]
    model.body.embed.register_forward_hook(lambda *called: called[-1].requires_grad_())  # type: ignore[union-attr]
    return model


def _trained_above(trains_head: bool) -> Record:
    with noting_order() as record:
        config = config_for(3, "torch", zero=ZERO["the next"])
        engine = partita.Engine(model=_with_inputs_that_require_gradients(trains_head), config=config)
        for step in range(3):
            engine.module.body.order = [0, 1, 2, 3] if step == engine.global_rank else [3]  # type: ignore[union-attr]
            engine.backward(engine(*batch_of(step, engine.global_rank)))
            engine.step()
        engine.destroy()
    return record


@pytest.mark.parametrize("trains_head", [False, True])
def test_frozen_blocks_at_the_end_of_a_backward(ranks, trains_head):
    """One rank's backward goes through them, another one's ends before; gradients of the root do not overtake them."""
    _assert_no_circle(ranks(2).run(_trained_above, trains_head))


@pytest.mark.slow
@pytest.mark.parametrize("zero", ZERO)
def test_three_ranks_launch_in_one_order(ranks, zero):
    """Each uses other blocks."""
    settings = config_for(3, "torch", zero=ZERO[zero])
    _assert_no_circle(ranks(3).run(_trained, other_blocks_on_each_rank, None, "", settings, True))


def _used_again(orders: list[list[int]]) -> str:
    engine = partita.Engine(model=make_blocks(), config=config_for(3, "torch"))
    for step in range(2):
        engine.module.body.order = [0, 1, 2, 3] if step == 0 else orders[engine.global_rank]  # type: ignore[union-attr]
        try:
            engine.backward(engine(*batch_of(step, engine.global_rank)))
        except CommunicationError as error:
            return str(error)
        engine.step()
    return ""


@pytest.mark.parametrize("other", [[0, 1, 2, 3, 2], pytest.param([0, 1, 2, 3], marks=pytest.mark.slow)])
def test_a_block_that_not_all_ranks_use_again_is_named(ranks, other):
    """Ranks that gathered different blocks would mix them, as these have the same sizes, or wait for ever."""
    assert ranks(2).run(_used_again, [[0, 1, 2, 3, 1]] * 2) == ["", ""]
    for error in ranks(2).run(_used_again, [[0, 1, 2, 3, 1], other]):
        assert "the gather of 'body.blocks.1.back.bias'" in error and "used again after 4 blocks" in error
