"""Schedules that split backwards: weight gradients are made where a rank would be idle.

Forwards and input gradients repeat a building block: the times at which one micro-batch is at each stage. The next one
follows when every rank has had time for all its actions. How long a micro-batch lives on a rank, over that interval, is
the number of activations there. Sources: Qi et al. 2023, arXiv:2401.10241 (ZB-H1, ZB-H2, ZB-V); Qi et al. 2024,
arXiv:2405.15362 (building blocks, V-Half, V-Min).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from partita.pipeline.list_schedule import InOrder, list_schedule
from partita.pipeline.schedule import Action, Kind, Schedule, looped, v_shaped
from partita.pipeline.simulate import Costs


@dataclass(frozen=True)
class Block:
    """Where one micro-batch is, and when.

    Attributes:
        stage_ranks: the rank of each stage.
        times: of F and of I, by stage; every action takes one.
    """

    stage_ranks: tuple[int, ...]
    times: Mapping[tuple[Kind, int], int]

    @property
    def interval(self) -> int:
        """Between two micro-batches: F, I and W of each stage of a rank."""
        return 3 * len(self.stage_ranks) // (max(self.stage_ranks) + 1)

    def orders(self, micro_batches: int, activation_bytes: Sequence[float]) -> list[InOrder]:
        """Of forwards and input gradients, by rank."""
        timed: list[list[tuple[int, Kind, int, int]]] = [[] for _ in range(max(self.stage_ranks) + 1)]
        for (kind, stage), time in self.times.items():
            of_rank = timed[self.stage_ranks[stage]]
            of_rank += [(time + self.interval * m, kind, stage, m) for m in range(micro_batches)]
        return [
            InOrder([Action(kind, stage, m) for _, kind, stage, m in sorted(of_rank)], activation_bytes)
            for of_rank in timed
        ]


def zb_h1(num_ranks: int, micro_batches: int) -> Schedule:
    """1F1B's order and memory (P micro-batches); idle (P-1)(F+I-W)."""
    return _filled(straight(num_ranks, 1, 2), micro_batches, num_ranks)


def zb_h2(num_ranks: int, micro_batches: int) -> Schedule:
    """Twice the memory (2P-1 micro-batches): no rank is idle between its first action and its last, where F = I = W."""
    return _filled(straight(num_ranks, 2, 4), micro_batches, 2 * num_ranks - 1)


def zb_v(num_ranks: int, micro_batches: int) -> Schedule:
    """Two stages per rank in a V, 1F1B's memory; idle until the last rank's first input is there, where F = I = W."""
    return _filled(v_block(num_ranks, (4, 2, 4, 2)), micro_batches, 2 * num_ranks)


def v_half(num_ranks: int, micro_batches: int) -> Schedule:
    """Half of 1F1B's memory: (P+2)//2 micro-batches; idle P/2 (F+I+W) at the most, where F = I = W."""
    return _filled(v_block(num_ranks, (2, 1, 2, 1)), micro_batches, 2 * ((num_ranks + 2) // 2))


def v_min(num_ranks: int, micro_batches: int) -> Schedule:
    """A third of 1F1B's memory: (P+4)//3 micro-batches; idle 2P/3 (F+I+W) at the most, where F = I = W."""
    return _filled(v_block(num_ranks, (1, 1, 1, 1)), micro_batches, 2 * ((num_ranks + 4) // 3))


def straight(num_ranks: int, forward: int, backward: int) -> Block:
    """One stage per rank: down the ranks, one after `forward`, and up, one after `backward`."""
    turn = (num_ranks - 1) * forward + 1
    times: dict[tuple[Kind, int], int] = {}
    for rank in range(num_ranks):
        times["F", rank] = rank * forward
        times["I", rank] = turn + (num_ranks - 1 - rank) * backward
    return Block(looped(num_ranks, 1), times)


def v_block(num_ranks: int, steps: tuple[int, int, int, int]) -> Block:
    """Two stages per rank: down, up, down and up again, with these steps from rank to rank, and turns as short as may
    be. On no rank are two of its four actions at the same place of the interval."""
    for turns in sorted(product(range(1, 7), repeat=3), key=sum):
        block = Block(v_shaped(num_ranks), _v_times(num_ranks, steps, turns))
        places: list[set[int]] = [set() for _ in range(num_ranks)]
        for (_, stage), time in block.times.items():
            places[block.stage_ranks[stage]].add(time % block.interval)
        if all(len(of_rank) == 4 for of_rank in places):
            return block
    raise AssertionError(f"no turns for steps of {steps}")


def _v_times(num_ranks: int, steps: tuple[int, int, int, int], turns: tuple[int, ...]) -> dict[tuple[Kind, int], int]:
    n = num_ranks - 1
    up = n * steps[0] + turns[0]
    down = up + n * steps[1] + turns[1]
    end = down + n * steps[2] + turns[2]
    times: dict[tuple[Kind, int], int] = {}
    for rank in range(num_ranks):
        back = 2 * num_ranks - 1 - rank
        times["F", rank] = rank * steps[0]
        times["F", back] = up + (n - rank) * steps[1]
        times["I", back] = down + rank * steps[2]
        times["I", rank] = end + (n - rank) * steps[3]
    return times


def _filled(block: Block, micro_batches: int, memory: int) -> Schedule:
    """The block for every micro-batch, and weight gradients where ranks would be idle, with memory for so many
    activations."""
    costs = Costs.equal(len(block.stage_ranks))
    orders = block.orders(micro_batches, costs.activation_bytes)
    return list_schedule(block.stage_ranks, micro_batches, costs, [memory] * len(orders), orders)
