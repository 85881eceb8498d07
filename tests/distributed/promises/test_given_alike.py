"""Ranks that are not given the same config, model, optimizer or data: all say what differs, before anything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import partita
import pytest
import torch
from support import OddModel, base_config, global_batch, make_model, part
from torch import nn

Given = dict[str, Any]  # the arguments of an engine


def _given(**changes: Any) -> Given:
    return {"model": make_model(), "config": base_config(stage=1, **changes)}


def _with_model(change: Callable[[OddModel], Any]) -> Given:
    given = _given()
    change(given["model"])
    return given


def _with_optimizer(*groups: float) -> Given:
    """AdamW over the parameters in turns, one group for each learning rate."""
    given = _given()
    parameters = list(given["model"].parameters())
    given["optimizer"] = torch.optim.AdamW([{"params": parameters[i::2], "lr": lr} for i, lr in enumerate(groups)])
    return given


def _with_data(samples: int, **changes: Any) -> Given:
    return {**_given(**changes), "train_data": list(torch.zeros(samples))}


def _reordered(model: OddModel) -> None:
    model._modules = {name: model._modules[name] for name in ("norm", "embed", "mix", "back", "head")}


# What the odd rank is given (the others: `usual`), and what all ranks say about the difference.
CASES: dict[str, tuple[Callable[[], Given], Callable[[], Given], str]] = {
    "learning rate": (
        _given,
        lambda: _given(optimizer={"type": "AdamW", "params": {"lr": 2e-3, "weight_decay": 0.1}}),
        "optimizer.params.lr is 0.01 on rank 0 and 0.002 on rank 1",
    ),
    "a key": (_given, lambda: _given(gradient_clipping=1.0), "gradient_clipping is 0.0 on rank 0 and 1.0 on rank 1"),
    "accumulation": (
        _given,
        lambda: _given(gradient_accumulation_steps=3),
        "gradient_accumulation_steps is None on rank 0 and 3 on rank 1",
    ),
    "stage": (
        _given,
        lambda: {"model": make_model(), "config": base_config(stage=2)},
        "zero_optimization.stage is 1 on rank 0 and 2 on rank 1",
    ),
    "transport": (
        _given,
        lambda: _given(comm={"transport": "torch"}),
        "comm.transport is auto on rank 0 and torch on rank 1",
    ),
    "shape": (
        _given,
        lambda: _with_model(lambda m: setattr(m, "back", nn.Linear(27, 14, bias=False))),
        "parameter back.weight is (13, 27) on rank 0 and (14, 27) on rank 1",
    ),
    "dtype": (
        _given,
        lambda: _with_model(lambda m: m.norm.half()),
        "the dtype of parameter norm.weight is torch.float32 on rank 0 and torch.float16 on rank 1",
    ),
    "frozen": (
        _given,
        lambda: _with_model(lambda m: m.scale.requires_grad_(False)),
        "requires_grad of parameter scale is True on rank 0 and False on rank 1",
    ),
    "one more": (
        _given,
        lambda: _with_model(lambda m: m.register_parameter("extra", nn.Parameter(torch.zeros(2)))),
        "parameter extra is missing on rank 0 and (2,) on rank 1",
    ),
    "order": (_given, lambda: _with_model(_reordered), "the order differs: parameter "),
    "buffer": (
        _given,
        lambda: _with_model(lambda m: m.register_buffer("offset", torch.zeros(1))),
        "buffer offset is (13,) of torch.float32 on rank 0 and (1,) of torch.float32 on rank 1",
    ),
    "groups": (
        lambda: _with_optimizer(1e-3, 1e-3),
        lambda: _with_optimizer(1e-3, 1e-4),
        "optimizer.param_groups[1]['lr'] is 0.001 on rank 0 and 0.0001 on rank 1",
    ),
    "group of a parameter": (
        lambda: _with_optimizer(1e-3, 1e-3),
        lambda: _with_optimizer(1e-3),
        "the optimizer group of parameter embed.weight is 1 on rank 0 and None on rank 1",
    ),
    "optimizer": (
        lambda: _with_optimizer(1e-3),
        lambda: {**_given(), "optimizer": torch.optim.SGD},
        "the class of the optimizer is AdamW on rank 0 and SGD on rank 1",
    ),
    "length of the data": (
        lambda: _with_data(40),
        lambda: _with_data(36),
        "the number of samples in the training data is 40 on rank 0 and 36 on rank 1",
    ),
    "order of the data": (
        lambda: _with_data(40),
        lambda: _with_data(40, seed=7),
        "seed is 1234 on rank 0 and 7 on rank",
    ),
}


def _all_cases(odd_one: int, world_size: int) -> dict[str, tuple[str, list[str]]]:
    """The error of each case, and the notes on it."""
    found = {}
    for name, (usual, other, _) in CASES.items():
        rank = torch.distributed.get_rank()
        try:
            partita.Engine(**(other if rank == odd_one else usual)()).destroy()
            found[name] = ("", [])
        except ValueError as error:
            found[name] = (str(error), list(getattr(error, "__notes__", [])))
    torch.distributed.barrier()
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_first_difference_is_named_on_all_ranks(ranks, world_size):
    """By key, parameter or group, with both values; each error says which rank it is of."""
    by_rank = ranks(world_size).run(_all_cases, 1, world_size)
    for rank, found in enumerate(by_rank):
        for name, (_, _, expected) in CASES.items():
            message, notes = found[name]
            assert expected in message, (rank, name, message)
            assert "were not given the same" in message, name
            assert message == by_rank[0][name][0]
            assert not hasattr(ValueError, "add_note") or notes == [f"(on rank {rank} of {world_size})"]


def _allowed_differences() -> list[float]:
    """Trains with all that may differ between ranks."""
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)
    offload = {"device": "cpu", "pin_memory": bool(rank)}
    config = base_config(
        stage=2,
        steps_per_print=rank,
        wall_clock_breakdown=bool(rank),
        dump_state=bool(rank),
        seed=rank,  # there are no data to order
        comm={"timeout_seconds": 40.0 + rank},
    )
    config["zero_optimization"]["offload_optimizer"] = offload
    engine = partita.Engine(OddModel(), config=config)  # other weights on each rank: those of rank 0 count
    engine.optimizer.param_groups[0]["a counter of the program"] = rank
    losses = []
    for step in range(2):
        batch = global_batch(step, engine.train_batch_size())
        losses.append(engine.train_batch(part(batch, rank, engine.world_size)).item())
    weights = [p.sum().item() for p in engine.module.parameters()]
    engine.destroy()
    return weights


def test_what_may_differ_between_ranks_is_not_refused(ranks):
    """Reports, timeouts, pinned memory, random states, initial weights, and what a program keeps in param groups."""
    first, second = ranks(2).run(_allowed_differences)
    assert first == second


def _first_step_after(change: str) -> list[str]:
    """A rank changes something by hand after a good step: the errors of the steps that follow."""
    engine = partita.Engine(make_model(), config=base_config(stage=1))
    rank = engine.global_rank

    def step(number: int) -> None:
        engine.train_batch(part(global_batch(number, engine.train_batch_size()), rank, engine.world_size))

    step(0)
    errors = []
    if rank == 1:
        if change == "micro-batches":
            engine.set_gradient_accumulation_boundary(False)
            step(1)
            engine.set_gradient_accumulation_boundary(None)
        elif change == "frozen":
            engine.module.embed.weight.requires_grad_(False)
        else:
            engine.optimizer.param_groups[0][change] = 0.5
    try:
        step(2)
    except RuntimeError as error:
        errors.append(str(error))
    if rank == 1:
        engine.optimizer.param_groups[0].update(lr=1e-2, weight_decay=0.1)
        engine.module.embed.weight.requires_grad_(True)
    step(3)  # alike again: training goes on
    engine.destroy()
    return errors


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            "lr",
            "step 2: the ranks of this job were not given the same: optimizer.param_groups[0]['lr'] is 0.01 on rank",
        ),
        ("weight_decay", "optimizer.param_groups[0]['weight_decay'] is 0.1 on rank 0 and 0.5 on rank 1"),
        ("micro-batches", "the number of micro-batches"),
        ("frozen", "requires_grad of parameter embed.weight is True on rank 0 and False on rank 1"),
    ],
)
def test_what_differs_later_is_named_at_the_step(ranks, change, expected):
    """Hyper-parameters, and micro-batches of a step; without them all ranks would train on."""
    for errors in ranks(2).run(_first_step_after, change):
        assert len(errors) == 1 and expected in errors[0], errors
