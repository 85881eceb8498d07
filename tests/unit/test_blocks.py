"""units/blocks.py: which modules are gathered together, and which parameters belong to them."""

from __future__ import annotations

import pytest
from partita.units.blocks import find_blocks, owners_of
from torch import nn


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(2, 2)


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 3)


class Expert(nn.Module):
    """A layer with layers inside."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Layer() for _ in range(2))


class Model(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


def paths_of(model: nn.Module, classes: list[str] | None = None) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    return [names[block] for block in find_blocks(model, classes)]


# -- which modules


def test_repeated_children_of_lists_and_sequentials_are_blocks_in_order_of_registration():
    model = Model(
        late=nn.ModuleList([Layer(), Layer()]), head=nn.Linear(2, 2), early=nn.Sequential(Other(), Layer(), Other())
    )
    assert paths_of(model) == ["late.0", "late.1", "early.0", "early.2"]


def test_a_single_child_is_no_block_and_what_repeats_inside_of_it_is():
    assert paths_of(Model(outer=nn.ModuleList([Expert()]))) == ["outer.0.experts.0", "outer.0.experts.1"]


def test_blocks_do_not_lie_inside_each_other():
    assert paths_of(Model(layers=nn.ModuleList([Expert(), Expert()]))) == ["layers.0", "layers.1"]
    assert paths_of(Model(layers=nn.ModuleList([Expert(), Expert()])), ["Layer", "Expert"]) == ["layers.0", "layers.1"]


def test_children_without_parameters_are_no_blocks():
    assert paths_of(nn.Sequential(nn.GELU(), nn.Linear(2, 2), nn.GELU(), nn.Dropout(), nn.Dropout())) == []


def test_attributes_of_one_class_are_no_blocks_unless_named():
    model = Model(a=Layer(), b=Layer())
    assert paths_of(model) == []
    assert paths_of(model, ["Layer"]) == ["a", "b"]


def test_a_block_that_is_registered_twice_is_one():
    layer = Layer()
    assert paths_of(Model(layers=nn.ModuleList([layer, layer])), ["Layer"]) == ["layers.0"]
    assert len(find_blocks(Model(layers=nn.ModuleList([layer, layer, Layer()])), None)) == 2


def test_named_classes_are_found_at_any_depth_and_replace_the_search():
    model = Model(first=Other(), layers=nn.ModuleList([Layer(), Layer()]), deep=Model(inner=Model(last=Other())))
    assert paths_of(model, ["Other"]) == ["first", "deep.inner.last"]


def test_the_model_itself_is_no_block():
    assert paths_of(Layer(), ["Layer"]) == []


def test_no_classes_mean_no_blocks():
    assert paths_of(Model(layers=nn.ModuleList([Layer(), Layer()])), []) == []


def test_a_class_that_the_model_lacks_is_named_beside_those_it_has():
    """Promise 7, F1."""
    model = Model(layers=nn.ModuleList([Layer(), Layer()]))
    with pytest.raises(ValueError, match=r"unit_classes: .* no module of class 'Block'; it has Layer, Linear, Model"):
        find_blocks(model, ["Layer", "Block"])
    with pytest.raises(ValueError, match=r"^some\.key: "):
        find_blocks(model, ["Block"], key="some.key")


# -- which parameters


def owners(model: nn.Module, classes: list[str] | None = None) -> dict[str, int | None]:
    named = dict(model.named_parameters())
    return dict(zip(named, owners_of(list(named.values()), find_blocks(model, classes), model), strict=True))


def test_parameters_of_a_block_are_its_own_and_others_the_roots():
    model = Model(embed=nn.Embedding(3, 2), layers=nn.ModuleList([Layer(), Layer()]), head=nn.Linear(2, 3))
    assert owners(model) == {
        "embed.weight": None,
        "layers.0.mix.weight": 0,
        "layers.0.mix.bias": 0,
        "layers.1.mix.weight": 1,
        "layers.1.mix.bias": 1,
        "head.weight": None,
        "head.bias": None,
    }


def test_a_parameter_of_two_blocks_is_the_roots():
    """G12: whichever block runs, it is there."""
    model = Model(layers=nn.ModuleList([Layer(), Layer()]))
    model.layers[1].mix.weight = model.layers[0].mix.weight
    assert owners(model) == {"layers.0.mix.weight": None, "layers.0.mix.bias": 0, "layers.1.mix.bias": 1}


@pytest.mark.parametrize("first", ["block", "outside"])
def test_a_parameter_of_a_block_and_of_a_module_outside_is_the_roots(first):
    model = Model(**dict(sorted({"layers": nn.ModuleList([Layer(), Layer()]), "head": nn.Linear(2, 2)}.items())))
    if first == "block":
        model.head.weight = model.layers[1].mix.weight
    else:
        model.layers[1].mix.weight = model.head.weight
    found = owners(model)
    assert found["head.weight"] is None
    assert "layers.1.mix.weight" not in found
    assert found["layers.1.mix.bias"] == 1


def test_a_parameter_that_the_model_itself_registers_too_is_the_roots():
    model = Model(layers=nn.ModuleList([Layer(), Layer()]))
    model.direct = model.layers[0].mix.weight
    assert owners(model)["direct"] is None


def test_a_parameter_shared_inside_of_one_block_is_that_blocks():
    model = Model(layers=nn.ModuleList([Expert(), Expert()]))
    for block in model.layers:
        block.experts[1].mix.weight = block.experts[0].mix.weight
    assert owners(model)["layers.1.experts.0.mix.weight"] == 1
