"""Gradients that a program drops before the step, in every way that torch has: what is left is what torch has left."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from itertools import product
from typing import Any

import partita
import pytest
import torch
from pairwise import pairwise
from reference import SGD
from small_models import Regression, assert_same_weights, config, inputs, seeded
from torch import Tensor, nn

STAGES = (0, 1, 2, 3)


class Fragile(Regression):
    """Its backward raises in the middle while `is_broken`."""

    is_broken = False

    def predict(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x.to(self.first.weight.dtype)))
        if self.is_broken:
            hidden.register_hook(_raise)
        return self.second(hidden)


def _raise(_grad: Tensor) -> None:
    raise ZeroDivisionError("in backward")


class Program:
    """A training loop's calls, over an engine or over plain torch on the data of all ranks."""

    def __init__(self, how: str) -> None:
        self.module: Any = seeded(Fragile)
        self.parent = nn.ModuleList([self.module])
        self.optimizer: Any = torch.optim.SGD(self.module.parameters(), **SGD["params"])
        self.given = self.optimizer
        self._how = how

    def drop(self) -> None:
        if self._how == "optimizer":
            self.optimizer.zero_grad()
        elif self._how == "given optimizer":
            self.given.zero_grad()
        elif self._how == "module":
            self.module.zero_grad()
        elif self._how == "zeros":
            self.module.zero_grad(set_to_none=False)
        elif self._how == "zeros of optimizer":
            self.optimizer.zero_grad(set_to_none=False)
        elif self._how == "parent":
            self.parent.zero_grad()
        else:
            for parameter in self.module.parameters():
                parameter.grad = None


class Plain(Program):
    def __init__(self, how: str, world_size: int) -> None:
        super().__init__(how)
        self._world_size = world_size

    def forward(self, seed: int) -> Tensor:
        return torch.stack([self.module(inputs(seed + 50 * rank)) for rank in range(self._world_size)]).mean()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def end(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.module.named_parameters()}


class Partita(Program):
    def __init__(self, how: str, stage: int, plain_backward: bool, offload: bool, accumulation: int = 1) -> None:
        super().__init__(how)
        zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 10, "stage3_param_persistence_threshold": 0}
        if offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        settings = config(zero_optimization=zero, optimizer=None, gradient_accumulation_steps=accumulation)
        self.engine, self.optimizer, *_ = partita.initialize(self.module, self.optimizer, config=settings)
        self._plain_backward = plain_backward

    def forward(self, seed: int) -> Tensor:
        return self.engine(inputs(seed + 50 * self.engine.global_rank))

    def backward(self, loss: Tensor) -> None:
        if self._plain_backward:
            loss.backward()
        else:
            self.engine.backward(loss)

    def step(self) -> None:
        self.engine.step()

    def end(self) -> dict[str, Tensor]:
        weights = self.engine.module_state_dict()
        self.engine.destroy()
        assert all(p.grad is None for p in self.module.parameters())
        return weights


def classic(program: Any, step: int) -> None:
    """`zero_grad()`, and nothing to drop."""
    program.drop()
    program.backward(program.forward(step))
    program.step()
    program.drop()


def other_loss(program: Any, step: int) -> None:
    """A GAN: gradients of another loss come first."""
    program.backward(program.forward(step + 10) * 3)
    program.drop()
    program.backward(program.forward(step))
    program.step()


def skipped(program: Any, step: int) -> None:
    """A batch is given up after its backward; the next one drops the gradients after its forward."""
    program.backward(program.forward(step + 10) * 3)
    program.backward(program.forward(step + 20) * 2)
    loss = program.forward(step)
    program.drop()
    program.backward(loss)
    program.step()


def between_two_losses(program: Any, step: int) -> None:
    """No forward comes between dropping and the next backward."""
    first, second = program.forward(step + 10), program.forward(step)
    program.backward(first)
    program.drop()
    program.backward(second)
    program.backward(program.forward(step + 5))
    program.step()


def after_an_exception(program: Any, step: int) -> None:
    """A backward breaks in the middle, and the program goes on."""
    program.module.is_broken = step == 1
    with suppress(ZeroDivisionError):
        program.backward(program.forward(step + 10))
    program.module.is_broken = False
    program.drop()
    program.backward(program.forward(step))
    program.step()


def a_part(program: Any, step: int) -> None:
    """One module of the model drops its own."""
    program.backward(program.forward(step + 10))
    program.module.second.zero_grad()
    program.module.first.weight.grad = None
    program.backward(program.forward(step))
    program.step()


SCRIPTS: list[Callable[[Any, int], None]] = [
    classic,
    other_loss,
    skipped,
    between_two_losses,
    after_an_exception,
    a_part,
]
WAYS = ["optimizer", "given optimizer", "module", "zeros", "zeros of optimizer", "parent", "by hand"]
STEPS = 4


def _run(program: Any, script: Callable[[Any, int], None]) -> dict[str, Tensor]:
    for step in range(STEPS):
        script(program, step)
    return program.end()


def _compare(cases: list[tuple[Any, ...]]) -> None:
    world_size = torch.distributed.get_world_size()
    for case in cases:
        script, way, stage, plain_backward, offload = case
        ours = _run(Partita(way, stage, plain_backward, offload and stage > 0), script)
        theirs = _run(Plain(way, world_size), script)
        try:
            assert_same_weights(ours, theirs, 1e-6)
        except AssertionError as error:
            raise AssertionError(f"{script.__name__}, {case[1:]}: {error}") from error


@pytest.mark.parametrize("world_size", [1, 2])
def test_dropped_gradients_are_gone(ranks, world_size):
    """F10. Whatever drops them, whenever."""
    cases = pairwise(product(SCRIPTS, WAYS, STAGES, [False, True], [False, True]))
    ranks(world_size).run(_compare, cases)


def _accumulate(stage: int, way: str) -> None:
    program = Partita(way, stage, False, False, accumulation=2)
    for step in range(3):
        for micro in range(2):
            program.drop()
            program.backward(program.forward(10 * step + micro))
            program.step()
            program.drop()
    theirs = Plain(way, program.engine.world_size)
    for step in range(3):
        for micro in range(2):
            (theirs.forward(10 * step + micro) / 2).backward()
        theirs.step()
    # The first micro-batch of a step can be taken back; then one is over, and the next cannot.
    program.backward(program.forward(77))
    program.drop()
    program.backward(program.forward(30))
    program.step()
    program.backward(program.forward(78))
    program.drop()
    for call in (lambda: program.forward(31), program.step):
        try:
            call()
        except RuntimeError as error:
            assert "second.bias" in str(error) and "engine.zero_grad()" in str(error), error
        else:
            raise AssertionError("not refused")
    program.engine.zero_grad()
    for micro in range(2):
        program.backward(program.forward(40 + micro))
        program.step()
        (theirs.forward(40 + micro) / 2).backward()
    theirs.step()
    assert_same_weights(program.end(), theirs.end(), 1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_finished_micro_batches_stay(ranks, stage):
    """F10. A loop with `zero_grad()` in each micro-batch accumulates; what cannot be told apart any more is refused."""
    for way in ("optimizer", "module"):
        ranks(2).run(_accumulate, stage, way)


# -- in one process


def _engine(**changes: Any) -> partita.Engine:
    return partita.Engine(seeded(), config=config(**changes))


def test_a_step_without_the_gradients_that_were_dropped_is_refused():
    """F10. In torch such a step changes nothing."""
    engine = _engine()
    engine.backward(engine(inputs()))
    engine.optimizer.zero_grad()
    with pytest.raises(partita.LifecycleError, match="no gradients are there"):
        engine.step()


def _drop_the_second(stage: int) -> None:
    """Micro-batch 1 is dropped when micro-batch 0 is finished, and its reductions may still be under way."""
    engine = _engine(gradient_accumulation_steps=2, zero_optimization={"stage": stage})
    engine.train_batch(iter([inputs(0), inputs(1)]))
    engine.backward(engine(inputs(2)))
    engine.step()
    engine.backward(engine(inputs(3)))
    engine.optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"added already to the gradients .* engine\.zero_grad\(\)"):
        engine.backward(engine(inputs(4)))
    engine.zero_grad()
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_finished_micro_batch_is_not_lost_with_a_later_one(ranks, stage):
    """Also where no reduction has been waited for yet, as with few units in stages 2 and 3."""
    ranks(2).run(_drop_the_second, stage)


def test_a_loop_that_never_ends_a_step_is_warned_of(caplog):
    """F10. `engine.zero_grad()` begins the whole step anew, so a loop that calls it in each micro-batch never steps."""
    engine = _engine(gradient_accumulation_steps=2)
    with caplog.at_level(logging.WARNING, "partita"):
        for _ in range(3):
            engine.zero_grad()
            engine.backward(engine(inputs()))
            engine.step()
    assert engine.global_steps == 0
    assert [r.message for r in caplog.records if "optimizer.zero_grad()" in r.message] == [caplog.records[0].message]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("foreach", [True, False])
def test_clipping_by_hand_is_warned_of_once(caplog, foreach):
    """F15. It has no gradients to clip."""
    engine = _engine(gradient_clipping=1.0)
    with caplog.at_level(logging.WARNING, "partita"):
        for _ in range(2):
            engine.backward(engine(inputs()))
            assert nn.utils.clip_grad_norm_(engine.module.parameters(), 1.0, foreach=foreach) == 0
            nn.utils.clip_grad_value_(engine.module.parameters(), 1.0, foreach=foreach)
            engine.step()
    (record,) = caplog.records
    assert "first.weight" in record.message and "gradient_clipping" in record.message


USES = {
    "read": lambda p: p.grad + 1,
    "item": lambda p: p.grad.abs().max().item(),
    "changed": lambda p: p.grad.add_(1.0),
    "copied": lambda p: p.grad.clone(),
    "optimizer": lambda p: torch.optim.SGD([p], lr=0.1).step(),
}


@pytest.mark.parametrize("use", USES)
def test_using_a_gradient_that_is_taken_is_refused(use):
    """Promise 7: with its name, and what to do."""
    engine = _engine()
    engine.backward(engine(inputs()))
    with pytest.raises(RuntimeError, match=r"'second\.weight'.*safe_get_full_grad"):
        USES[use](engine.module.second.weight)
    engine.step()


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_taken_has_no_memory(stage):
    """It has a shape, a dtype and a device, and `destroy()` takes it away."""
    engine = _engine(zero_optimization={"stage": stage})
    engine.backward(engine(inputs()))
    for parameter in engine.module.parameters():
        grad = parameter.grad
        assert (grad.shape, grad.dtype, grad.device) == (parameter.shape, parameter.dtype, parameter.device)
        assert grad.untyped_storage().nbytes() == 0 or grad.data_ptr() == 0
        assert "TakenGradient('" in repr(grad)
    module = engine.module
    engine.destroy()
    assert all(p.grad is None for p in module.parameters())


def _create_graph(program: Any, step: int) -> None:
    loss = program.forward(step)
    loss.backward(create_graph=True)
    program.drop()
    program.forward(step + 10).backward(create_graph=True)
    program.forward(step + 20).backward(create_graph=True)
    program.step()


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize(("stage", "way"), list(product([0, 2], ["optimizer", "module"])))
def test_gradients_with_a_graph_of_their_own_are_dropped_too(stage, way):
    """F10. Autograd adds them out of place."""
    assert_same_weights(_run(Partita(way, stage, True, False), _create_graph), _run(Plain(way, 1), _create_graph), 1e-6)
