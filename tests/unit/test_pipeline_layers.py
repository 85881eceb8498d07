"""Layers of a pipeline: specs, how layers are divided, and parameters that several of them have."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from partita.pipeline import LayerSpec, PipelineModule, TiedLayerSpec
from torch import Tensor, nn
from torch.nn import functional as F


def built(layers: Any, stage_ranks: Sequence[int] | None = None, num_stages: int = 1, **kwargs: Any) -> PipelineModule:
    """After the same random numbers as all others."""
    torch.manual_seed(1)
    module = PipelineModule(layers, num_stages=num_stages, **kwargs)
    module.build(stage_ranks)
    return module


# -- specs


def test_a_spec_builds_what_it_says():
    spec = LayerSpec(nn.Linear, 3, out_features=2, bias=False)
    layer = spec.build()
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features, layer.bias) == (3, 2, None)
    assert repr(spec) == "LayerSpec(Linear, 3, out_features=2, bias=False)"
    assert repr(TiedLayerSpec("k", nn.Linear, 3)) == "TiedLayerSpec(Linear, 3)"


def head(module: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return F.linear(x, module.weight)


class Partly(nn.Module):
    """Has its weight in a child."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)


class Own(nn.Sequential):
    """Does more than to call its children."""

    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("attribute", ["inner.weight", ["inner.weight", "inner.bias"]])
def test_a_tied_weight_may_be_in_a_child(attribute):
    TiedLayerSpec("k", Partly, tied_weight_attr=attribute).build()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "layers is empty"),
        ([nn.Linear], r"layer 0 is the class Linear: give LayerSpec\(Linear, ...\)"),
        ([nn.Identity(), 3], "layer 1 is a int"),
        (nn.Linear(2, 2), "layers is a Linear: give a list"),
        (
            type("Own", (nn.Sequential,), {"forward": lambda self, x: x})(nn.Linear(2, 2)),
            "Own has a forward of its own",
        ),
        ([nn.Linear(2, 2).forward], "layer 0 is a method of a Linear, whose parameters"),
        ([TiedLayerSpec("k", Partly)], r"'k': Partly has no attribute 'weight'.*\(inner.weight, inner.bias\)"),
        ([TiedLayerSpec("k", nn.Linear, 2, 2), TiedLayerSpec("k", nn.Linear, 2, 3)], "the same class and arguments"),
        ([TiedLayerSpec("k", nn.Linear, 2, 2), TiedLayerSpec("k", nn.Bilinear, 2, 2)], "the same class and arguments"),
        (
            [TiedLayerSpec("k", nn.Linear, 2, 2), TiedLayerSpec("k", nn.Linear, 2, 2, bias=False)],
            "the same class and arguments",
        ),
    ],
)
def test_what_is_no_layer_is_refused(layers, message):
    with pytest.raises((TypeError, ValueError), match=message):
        PipelineModule(layers, num_stages=1)


def test_a_spec_of_no_module_is_refused():
    with pytest.raises(
        TypeError, match=r"is no class of torch\.nn\.Module; modules and functions are layers as they are"
    ):
        LayerSpec(torch.relu)  # type: ignore[arg-type]


# -- division


def linears(widths: Sequence[int], as_specs: bool = True) -> list[Any]:
    sizes = list(pairwise(widths))
    return [LayerSpec(nn.Linear, *size) if as_specs else nn.Linear(*size) for size in sizes]


class Stubborn(nn.Linear):
    """Cannot be built on the meta device."""

    def __init__(self, n: int) -> None:
        super().__init__(n, n)
        self.start = self.weight[0, 0].item()


@pytest.mark.parametrize("as_specs", [True, False])
def test_stages_have_about_as_many_trained_parameters(as_specs):
    layers = linears([4, 4, 4, 4, 100, 4], as_specs)
    assert built(layers, [0, 0]).bounds == [range(4), range(4, 5)]
    if not as_specs:
        layers[4].requires_grad_(False)
        assert built(layers, [0, 0]).bounds == [range(3), range(3, 5)]


def test_a_layer_that_only_exists_with_memory_is_counted_too():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    PipelineModule([LayerSpec(Stubborn, 50), LayerSpec(Stubborn, 4)], num_stages=1, seed_layers=True)
    assert torch.equal(torch.rand(1), expected)
    module = built([LayerSpec(Stubborn, 50), LayerSpec(Stubborn, 4), LayerSpec(Stubborn, 4)], [0, 0])
    assert module.bounds == [range(1), range(1, 3)]


def test_layers_are_divided_as_the_method_says():
    layers = [nn.Linear(100, 100), *[torch.relu] * 2, nn.Tanh(), *[LayerSpec(nn.Linear, 2, 2)] * 2]
    assert built(layers, [0, 0, 0], partition_method="uniform").bounds == [range(2), range(2, 4), range(4, 6)]
    for method in ("type:LINEAR", "Type:^lin", "type:relu|tanh"):
        division = built(layers, [0, 0, 0], partition_method=method).bounds
        matching = (0, 4, 5) if "relu" not in method else (1, 2, 3)
        assert [len(set(matching) & set(stage)) for stage in division] == [1, 1, 1]
    costs = [1, 1, 1, 1, 1, 5]
    assert built(layers, [0, 0], partition_method="cost", layer_costs=costs).bounds == [range(5), range(5, 6)]


# -- parameters that several layers have


def gpt(as_specs: bool) -> Any:
    """An embedding whose weight is the head's too, at places 0, 2 and 4."""
    if as_specs:
        tied = [TiedLayerSpec("word", nn.Embedding, 5, 3, forward_fn=f) for f in (None, head, F_embedding)]
        return [tied[0], LayerSpec(nn.Linear, 3, 3), tied[1], Rounded(), tied[2]]
    torch.manual_seed(0)
    embedding, last = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    last.weight = embedding.weight
    return nn.Sequential(embedding, nn.Linear(3, 3), last, Rounded(), embedding)


def F_embedding(module: nn.Module, x: Tensor) -> Tensor:  # noqa: N802
    return module(x)  # type: ignore[no-any-return]


class Rounded(nn.Module):
    """Logits to indices."""

    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(-1)


TIED_NAMES = {0: ["0.weight"], 1: ["2.weight"], 2: ["4.weight"]}


@pytest.mark.parametrize("as_specs", [True, False])
def test_each_stage_has_a_copy_of_what_is_tied(as_specs):
    module = built(gpt(as_specs), [0, 0, 0], partition_method="uniform")
    assert module.bounds == [range(2), range(2, 4), range(4, 5)]
    assert [(tie.stages, tie.names) for tie in module.ties] == [((0, 1, 2), TIED_NAMES)]
    assert module.replicas == {"2.weight": "0.weight", "4.weight": "0.weight"}
    copies = [module.get_parameter(name) for names in TIED_NAMES.values() for name in names]
    assert len({id(p) for p in copies}) == len({p.data_ptr() for p in copies}) == 3
    assert all(torch.equal(p, copies[0]) for p in copies)
    ids = torch.tensor([[0, 1, 4]])
    assert torch.equal(module(ids), built(gpt(as_specs))(ids))


@pytest.mark.parametrize("as_specs", [True, False])
def test_a_stage_shares_one_module_among_its_uses(as_specs):
    module = built(gpt(as_specs), [0])
    assert (module.ties, module.replicas) == ([], {})
    assert [name for name, _ in module.named_parameters()] == ["0.weight", "1.weight", "1.bias"]
    stage = module.stages[0]
    assert stage.get_parameter("0.weight") is stage.get_parameter("2.weight") is stage.get_parameter("4.weight")


@pytest.mark.parametrize("as_specs", [True, False])
def test_all_ranks_know_of_all_ties(as_rank, as_specs):
    for rank, replicas in enumerate([{}, {"2.weight": "0.weight"}, {"4.weight": "0.weight"}]):
        as_rank(rank, 3)
        module = built(gpt(as_specs), num_stages=3, partition_method="uniform")
        assert [(tie.stages, tie.names) for tie in module.ties] == [((0, 1, 2), TIED_NAMES)]
        assert module.replicas == replicas


def test_only_what_is_tied_is_copied():
    """The modules of a program stay those that it gave."""
    layers = gpt(False)
    parameters = list(layers.parameters())
    module = built(layers, [0, 0, 0], partition_method="uniform")
    assert all(module.get_submodule(str(i)) is layers[i] for i in (0, 1, 3))
    assert [id(p) for p in module.stages[0].parameters()] == [id(p) for p in parameters]


def test_what_a_copied_module_does_not_share_is_not_copied():
    first, second, third = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    third.bias = second.bias
    module = built([first, second, third], [0, 0], partition_method="cost", layer_costs=[2, 1, 1])
    assert module.bounds == [range(1), range(1, 3)]
    assert [name for name, _ in module.stages[1].named_parameters()] == ["1.weight", "1.bias", "2.weight"]
    assert module.get_parameter("1.weight") is not first.weight
    assert module.get_parameter("1.bias") is module.get_parameter("2.bias") is second.bias
    assert module.get_submodule("2") is third


class WithWeight(nn.Module):
    """A loss that computes the head, too."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.bias = weight, nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, self.weight, self.bias), labels)


def test_a_loss_may_share_the_parameters_of_a_layer():
    embedding = nn.Embedding(5, 3)
    loss = WithWeight(embedding.weight)
    module = built([embedding, nn.Linear(3, 3)], [0, 0], loss_fn=loss)
    assert [(tie.stages, tie.names) for tie in module.ties] == [((0, 1), {0: ["0.weight"], 1: ["loss_fn.weight"]})]
    assert module.replicas == {"loss_fn.weight": "0.weight"}
    assert [name for name, _ in module.stages[1].named_parameters()] == [
        "1.weight",
        "1.bias",
        "loss_fn.weight",
        "loss_fn.bias",
    ]
    ids = torch.tensor([1, 2])
    assert torch.equal(module(ids, ids), loss(module.get_submodule("1")(embedding(ids)), ids))
