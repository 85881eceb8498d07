"""A stage of a pipeline: layers one after the other, skips, recomputed activations, the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from partita.pipeline import LayerSpec, PipelineModule
from partita.units import find_blocks
from torch import Tensor, nn

LAYERS = 7
SKIPS = {3: [0], 5: [1, 3], 6: [0]}


class Sums(nn.Module):
    """Adds up what it gets; counts its forwards, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: Tensor, *skipped: Tensor) -> Tensor:
        self.calls += 1
        noise = torch.rand(4) if self.training else torch.zeros(4)
        return torch.tanh(self.linear(x)) + noise + sum((i + 2) * s for i, s in enumerate(skipped))


def built(stage_ranks: Sequence[int], skips: Mapping[int, Sequence[int]] = SKIPS, **kwargs: Any) -> PipelineModule:
    layers = [LayerSpec(Sums) for _ in range(LAYERS)]
    module = PipelineModule(layers, num_stages=1, skips=skips, seed_layers=True, partition_method="uniform", **kwargs)
    module.build(stage_ranks)
    return module


def gradients(module: PipelineModule) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    out = module(torch.ones(2, 4))
    out.sum().backward()
    return out.detach(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def by_hand(module: PipelineModule) -> Tensor:
    torch.manual_seed(0)
    outputs: list[Tensor] = []
    x = torch.ones(2, 4)
    for i in range(LAYERS):
        x = module.get_submodule(str(i))(x, *[outputs[source] for source in SKIPS.get(i, ())])
        outputs.append(x)
    return x


def assert_same(a: tuple[Tensor, dict[str, Tensor]], b: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.equal(a[0], b[0])
    assert a[1].keys() == b[1].keys()
    assert all(torch.equal(a[1][name], b[1][name]) for name in a[1])


def test_a_layer_gets_the_outputs_that_it_skips_from():
    module = built([0])
    out, found = gradients(module)
    assert torch.equal(out, by_hand(module))
    assert len(found) == 2 * LAYERS


@pytest.mark.parametrize("stages", range(2, LAYERS + 1))
@pytest.mark.parametrize("interval", [0, 2])
def test_skips_go_between_any_two_stages(stages, interval):
    module = built([0] * stages, activation_checkpoint_interval=interval)
    assert_same(gradients(module), gradients(built([0])))


def test_a_stage_says_what_goes_beside_the_chain():
    module = built([0] * LAYERS)
    assert module.skip_edges == {(0, 3), (1, 5), (3, 5), (0, 6)}
    assert module.carried(0, 6) == [0]
    module = built([0] * 3)
    assert module.bounds == [range(3), range(3, 5), range(5, 7)]
    assert module.skip_edges == {(0, 1), (0, 2), (1, 2)}
    assert (module.carried(0, 1), module.carried(0, 2), module.carried(1, 2)) == ([0], [0, 1], [3])
    x, kept = module.stages[0](torch.ones(2, 4), {})
    assert sorted(kept) == [0, 1]
    with pytest.raises(KeyError):
        module.stages[1](x, {})


def test_what_comes_by_the_chain_is_not_sent_twice():
    """A skip from the last layer of the stage before."""
    module = built([0] * 3, skips={4: [2]})
    assert module.bounds[1] == range(3, 5)
    assert (module.skip_edges, module.carried(0, 1)) == (set(), [])
    assert_same(gradients(module), gradients(built([0], skips={4: [2]})))


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(2, 6)), max_size=6), st.integers(1, 7), st.integers(0, 3))
def test_any_skips_in_any_division_compute_the_same(pairs, stages, interval):
    skips: dict[int, list[int]] = {}
    for source, layer in set(pairs):
        if source < layer - 1:
            skips.setdefault(layer, []).append(source)
    skips = {layer: sorted(sources) for layer, sources in skips.items()}
    module = built([0] * stages, skips, activation_checkpoint_interval=interval)
    assert_same(gradients(module), gradients(built([0], skips)))


# -- layers that write into their input


def changing(stage_ranks: Sequence[int], interval: int, *, in_place: bool) -> PipelineModule:
    """Every other layer changes its input; the output of layer 0 is taken by layer 4, too."""
    layers = [layer for _ in range(3) for layer in (LayerSpec(Sums), LayerSpec(nn.Dropout, 0.5, inplace=in_place))]
    module = PipelineModule(
        layers,
        num_stages=1,
        skips={4: [0]},
        seed_layers=True,
        partition_method="uniform",
        activation_checkpoint_interval=interval,
    )
    module.build(stage_ranks)
    return module


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("interval", [0, 1, 2])
def test_a_layer_may_change_its_input_in_place(stages, interval):
    module = changing([0] * stages, interval, in_place=True)
    assert_same(gradients(module), gradients(changing([0], 0, in_place=False)))


@pytest.mark.parametrize("interval", [0, 1])
def test_what_comes_from_another_stage_is_not_changed(interval):
    """It is a leaf of this rank's graph, and may be in memory that the other stage needs."""
    stage = changing([0] * 6, interval, in_place=True).stages[1]
    x = torch.ones(2, 4, requires_grad=True)
    stage(x, {})[0].sum().backward()
    assert torch.equal(x, torch.ones(2, 4))
    assert x.grad is not None


# -- activation checkpointing


def calls(module: PipelineModule) -> list[int]:
    return [part.calls for part in module.modules() if isinstance(part, Sums)]


@pytest.mark.parametrize("interval", [1, 2, 3, 7, 9])
def test_checkpointed_layers_are_computed_again_with_the_same_bits(interval):
    module = built([0, 0], activation_checkpoint_interval=interval)
    assert_same(gradients(module), gradients(built([0])))
    # The last layer of a run may be left out of the recomputation: nothing of it is needed.
    assert all(2 >= n >= 1 for n in calls(module))
    assert sum(calls(module)) > LAYERS


def test_only_inputs_of_runs_are_kept():
    def kept(interval: int) -> int:
        found = []
        module = built([0], skips={}, activation_checkpoint_interval=interval)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
            module(torch.ones(2, 4))
        return len(found)

    assert kept(7) < kept(2) < kept(0)


def test_nothing_is_checkpointed_where_there_is_no_backward():
    module = built([0], activation_checkpoint_interval=2)
    module.eval()
    module(torch.ones(2, 4)).sum().backward()
    module.train()
    with torch.no_grad():
        module(torch.ones(2, 4))
    assert calls(module) == [2] * LAYERS


@pytest.mark.parametrize(("classes", "expected"), [(["Sums"], True), (["Linear"], False), ([], False)])
def test_only_runs_of_the_named_classes_are_checkpointed(classes, expected):
    module = built([0], activation_checkpoint_interval=2, checkpointable_layers=classes)
    gradients(module)
    assert (sum(calls(module)) > LAYERS) == expected


# -- the loss


def squares(out: Tensor, labels: Tensor) -> Tensor:
    return ((out - labels) ** 2).mean()


class Scaled(nn.Module):
    """A loss that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, out: Tensor, labels: Tensor) -> Tensor:
        return self.scale * squares(out, labels)


@pytest.mark.parametrize("loss_fn", [squares, Scaled()])
def test_the_last_stage_computes_the_loss(loss_fn):
    module = built([0, 0], skips={}, loss_fn=loss_fn)
    module.eval()
    x, labels = torch.ones(2, 4), torch.zeros(2, 4)
    first, _ = module.stages[0](x, {}, labels)
    loss, kept = module.stages[1](first, {}, labels)
    assert kept == {}
    assert torch.equal(loss, loss_fn(module(x), labels))
    assert torch.equal(loss, module(x, labels))
    trained = "loss_fn.scale" in dict(module.named_parameters())
    assert trained == ("loss_fn.scale" in dict(module.stages[1].named_parameters())) == (loss_fn is not squares)


def test_a_loss_may_be_set_until_the_layers_are_built():
    module = PipelineModule([nn.Linear(4, 4)], num_stages=1)
    module.loss_fn = Scaled()
    assert [name for name, _ in module.named_parameters()] == ["0.weight", "0.bias", "loss_fn.scale"]
    module = PipelineModule([nn.Linear(4, 4)], num_stages=1, loss_fn=Scaled())
    module.loss_fn = squares
    assert [name for name, _ in module.named_parameters()] == ["0.weight", "0.bias"]


# -- as a module


def test_what_layers_give_to_each_other_is_one_argument():
    def pair(x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x + 1

    def both(xs: tuple[Tensor, Tensor]) -> dict[str, Any]:
        return {"sum": xs[0] + xs[1], "n": 3}

    layers: list[Callable[..., Any]] = [pair, both, nn.Identity()]
    module = PipelineModule(layers, num_stages=1, activation_checkpoint_interval=1)
    module.build([0, 0, 0])
    out = module(torch.ones(2))
    assert out["n"] == 3
    assert torch.equal(out["sum"], torch.full((2,), 3.0))


def test_repeated_layers_of_a_stage_are_found():
    module = PipelineModule([nn.Embedding(4, 4), *[nn.Linear(4, 4) for _ in range(6)]], num_stages=1, loss_fn=Scaled())
    module.build([0, 0])
    for stage in module.stages.values():
        blocks = find_blocks(stage, None)
        assert len(blocks) > 1
        assert all(type(block) is nn.Linear for block in blocks)


def test_a_replaced_layer_is_called():
    module = built([0, 0], skips={})
    stage = module.stages[1]
    stage.add_module("4", nn.Identity())
    x = torch.ones(2, 4)
    stage.eval()
    expected = stage.get_submodule("6")(stage.get_submodule("5")(x))
    assert torch.equal(stage(x, {})[0], expected)
