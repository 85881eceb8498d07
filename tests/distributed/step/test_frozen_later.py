"""Parameters that a program freezes in mid-training stand still, and their states wait, as in torch."""

from __future__ import annotations

from itertools import product
from typing import Any

import partita
import pytest
import torch
from dictated import SPLIT, Dictated, assert_follows, config_for, dictate, masters, merged, share, take_step
from pairwise import pairwise
from torch import Tensor

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.1}),
    "Adam": (torch.optim.Adam, {"lr": 0.05, "weight_decay": 0.1}),
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.05}),
}
# Parameters that are frozen in each step; a frozen one goes on later, another one waits twice.
FROZEN = ["", "", "ae", "ae", "e", "", "ce", "ce", "c", "", "a", ""]
OVERFLOWS = (3, 6)  # steps that fp16 skips: nobody waits in those


def _freeze(module: Dictated, step: int) -> None:
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in FROZEN[step])


def _gradients(step: int) -> dict[str, Tensor]:
    return {name: grad for name, grad in dictate(step).items() if name not in FROZEN[step]}


def _plain(kind: str, skips: tuple[int, ...] = ()) -> dict[str, Tensor]:
    module = Dictated()
    make, options = OPTIMIZERS[kind]
    optimizer = make(module.parameters(), **options)
    for step in range(len(FROZEN)):
        for name, parameter in module.named_parameters():
            parameter.grad = _gradients(step).get(name)
        if step not in skips:
            optimizer.step()
    return {name: p.detach().flatten() for name, p in module.named_parameters()}


def _train(kind: str, config: dict[str, Any], restart: int | None, late: bool) -> dict[str, Tensor]:
    def build() -> tuple[Dictated, partita.Engine]:
        module = Dictated()
        make, options = OPTIMIZERS[kind]
        return module, partita.Engine(module, make(module.parameters(), **options), config=config)

    module, engine = build()
    for step in range(len(FROZEN)):
        if step == restart:
            snapshot = engine.train_state().copy()
            engine.destroy()
            module, engine = build()
            engine.train_state().restore(snapshot)
        if late:  # after the backward: their gradients are there, and have no part in the step
            engine.backward(engine(share(dictate(step), engine.global_rank, engine.world_size)))
            _freeze(module, step)
            engine.step()
            for parameter in module.parameters():
                parameter.requires_grad_(True)
            continue
        _freeze(module, step)
        grads = _gradients(step)
        if "fp16" in config and step in OVERFLOWS:
            grads = {name: grad * torch.inf for name, grad in grads.items()}
        take_step(engine, grads)
    found = masters(engine)
    engine.destroy()
    return found


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_frozen_parameter_stands_still_and_its_state_waits(ranks, kind):
    """F12. Weights and moments as if the steps had not been, in every stage; also over a restart."""
    for stage, precision, restart, late in pairwise(
        product((0, 1, 2, 3), ("fp32", "bf16", "fp16"), (None, 3, 5), (False, True))
    ):
        config = config_for(stage, precision)
        found = merged(ranks(2).run(_train, kind, config, restart, late))
        assert_follows(found, _plain(kind, OVERFLOWS if precision == "fp16" and not late else ()), 2e-6)


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_states_on_the_host_wait_too(ranks, kind):
    """F12. And split masters."""
    offload = {"stage": 2, "reduce_bucket_size": 40, "offload_optimizer": {"device": "cpu"}}
    found = merged(ranks(2).run(_train, kind, {**config_for(2), "zero_optimization": offload}, None, False))
    assert_follows(found, _plain(kind), 2e-6)


def test_split_masters_wait_too(ranks):
    """F12. Their parameters are not written either."""
    found = merged(ranks(2).run(_train, "AdamW", config_for(1, **SPLIT), 5, False))
    assert_follows(found, _plain("AdamW"), 2e-6)


def test_the_norm_is_that_of_what_moves():
    """F12. Clipping does not see the gradient of a parameter that was frozen after its backward."""
    engine = partita.Engine(Dictated(), config=config_for(optimizer={"type": "SGD", "params": {"lr": 0.1}}))
    engine.backward(engine(dictate(0)))
    engine.module.e.requires_grad_(False)
    engine.step()
    rest = torch.cat([grad.flatten() for name, grad in dictate(0).items() if name != "e"])
    assert engine.get_global_grad_norm() == pytest.approx(rest.norm().item(), rel=1e-6)
