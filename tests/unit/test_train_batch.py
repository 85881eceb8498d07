"""train_batch: the forms of a batch, the forms of an output, and what it says about others."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from partita import Engine
from small_models import Regression, assert_same_weights, config, inputs, seeded, weights
from torch import Tensor


def trained(make: Any, batches: list[Any], accumulation: int = 2) -> tuple[list[float], dict[str, Tensor]]:
    engine = Engine(seeded(make), config=config(gradient_accumulation_steps=accumulation))
    losses = [engine.train_batch(batch).item() for batch in batches]
    assert engine.global_steps == len(batches)
    assert engine.micro_steps == accumulation * len(batches)
    engine.destroy()
    return losses, weights(engine.module)


@pytest.fixture(scope="module")
def expected() -> tuple[list[float], dict[str, Tensor]]:
    """By hand: two micro-batches of two."""
    engine = Engine(seeded(), config=config(gradient_accumulation_steps=2))
    losses = []
    for step in range(3):
        parts = [engine(part) for part in inputs(step).chunk(2)]
        losses.append(sum(loss.item() for loss in parts) / 2)
        for part in inputs(step).chunk(2):
            engine.backward(engine(part))
            engine.step()
    return losses, weights(engine.module)


BATCHES: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x,),
    "list": lambda x: [x],
    "dict": lambda x: {"x": x},
    "mapping": lambda x: UserDict(x=x),
    "iterator": lambda x: iter(x.chunk(2)),
    "generator of dicts": lambda x: ({"x": part} for part in x.chunk(2)),
    "longer iterator": lambda x: iter([*x.chunk(2), None]),
}


@pytest.mark.parametrize("form", BATCHES)
def test_every_form_of_a_batch_trains_the_same(form, expected):
    """One batch is divided along dimension 0; an iterator gives micro-batches; mappings become keyword arguments."""
    losses, final = trained(Regression, [BATCHES[form](inputs(step)) for step in range(3)])
    assert losses == pytest.approx(expected[0], rel=1e-6)
    assert_same_weights(final, expected[1])


@dataclass
class Output:
    """As Hugging Face's models give it: an object with `loss` first."""

    loss: Tensor
    logits: Tensor


class NamedOutput(NamedTuple):
    loss: Tensor
    logits: Tensor


OUTPUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "scalar": lambda loss, logits: loss,
    "one element": lambda loss, logits: loss.reshape(1),
    "tuple": lambda loss, logits: (loss, logits),
    "list": lambda loss, logits: [loss, logits],
    "dict": lambda loss, logits: {"logits": logits, "loss": loss},
    "mapping": lambda loss, logits: UserDict(logits=logits, loss=loss),
    "named tuple": NamedOutput,
    "object": Output,
    "namespace": lambda loss, logits: SimpleNamespace(loss=loss, logits=logits),
    "with a parameter": lambda loss, logits: (loss, PARAMETER),
}
PARAMETER = torch.nn.Parameter(torch.ones(3))


@pytest.mark.parametrize("form", OUTPUTS)
def test_the_loss_is_found_in_every_form_of_an_output(form, expected):
    class Model(Regression):
        def forward(self, x: Tensor) -> Any:
            return OUTPUTS[form](super().forward(x), self.predict(x))

    losses, final = trained(Model, [inputs(step) for step in range(3)])
    assert losses == pytest.approx(expected[0], rel=1e-6)
    assert_same_weights(final, expected[1])


def test_a_parameter_among_the_outputs_collects_no_hooks():
    """F5: a forward leaves nothing on what outlives it."""

    class Model(Regression):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), self.first.weight

    engine = Engine(seeded(Model), config=config())
    for step in range(3):
        engine.train_batch(inputs(step))
    assert not engine.module.first.weight._backward_hooks


@pytest.mark.parametrize("output", [None, 3.0, torch.ones(2), (), {"logits": torch.ones(2)}, "text", SimpleNamespace()])
def test_an_output_without_a_loss_is_named_by_its_type(output):
    """Promise 7."""

    class Model(Regression):
        def forward(self, x: Tensor) -> Any:
            return output

    engine = Engine(seeded(Model), config=config())
    with pytest.raises(TypeError, match=rf"no loss.*{type(output).__name__}.*return a scalar"):
        engine.train_batch(inputs())


def test_a_batch_that_does_not_divide_is_named_by_its_shape():
    """Promise 7; nothing was trained before the error."""
    engine = Engine(seeded(), config=config(gradient_accumulation_steps=3))
    with pytest.raises(ValueError, match=r"shape \(4, 4\).*3 micro-batches.*gradient_accumulation_steps"):
        engine.train_batch(inputs())
    assert engine.micro_steps == 0


def test_a_batch_without_tensors_is_named_by_its_type():
    """Promise 7; it would be trained on as a whole, twice."""
    engine = Engine(seeded(), config=config(gradient_accumulation_steps=2))
    with pytest.raises(TypeError, match=r"list without tensors.*2 micro-batches"):
        engine.train_batch([[1.0, 2.0], "text"])


def test_without_accumulation_a_batch_is_passed_on_as_it_is():
    """Nothing to divide, so tensors without dimensions and other types may be in it."""

    class Model(Regression):
        def forward(self, x: Tensor, factor: Tensor, rows: list[int]) -> Tensor:
            return super().forward(x[rows]) * factor

    engine = Engine(seeded(Model), config=config())
    engine.train_batch((inputs(), torch.tensor(2.0), [0, 2]))
    assert engine.global_steps == 1


def test_an_iterator_that_ends_early_says_how_far_it_came():
    """F4, promise 7; zero_grad() begins the step anew and training goes on right."""
    engine = Engine(seeded(), config=config(gradient_accumulation_steps=3))
    with pytest.raises(ValueError, match="after 2 of the 3 micro-batches"):
        engine.train_batch(iter(inputs().chunk(2)))
    assert engine.global_steps == 0
    engine.zero_grad()
    engine.train_batch(inputs(1, samples=6))
    _, final = trained(Regression, [inputs(1, samples=6)], accumulation=3)
    assert_same_weights(weights(engine.module), final)


def test_no_batch_and_no_data_says_what_to_give():
    """Promise 7."""
    with pytest.raises(ValueError, match=r"needs a batch or an iterator.*train_data"):
        Engine(seeded(), config=config()).train_batch()
