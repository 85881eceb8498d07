"""What constructors do with parameters inside zero.Init: copies, aliases, views, parametrizations, other memory."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import partita
import pytest
import torch
from blocks_model import TRANSPORTS, assert_same_weights, config_for, error_of
from partita import zero
from partita.units import holder_of
from partita.zero import AbsentParameterError, GatheredParameters
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, parametrizations, parametrize, vector_to_parameters
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

Make = Callable[[], nn.Module]


def _then(module: nn.Module, *work: Callable[[Any], Any]) -> nn.Module:
    """The module, after some work on it; other modules come in between."""
    for do in work:
        do(module)
        nn.Linear(3, 3)
    return module


def _wave() -> nn.Module:
    """The positional convolution of wav2vec2 and its family: initialised, normed, initialised again."""
    conv = nn.Conv1d(4, 4, 5, padding=2, groups=2)
    nn.init.normal_(conv.weight, std=0.4)
    normed = parametrizations.weight_norm(conv, name="weight", dim=2)
    nn.init.constant_(normed.bias, 0.1)
    return nn.Sequential(nn.Linear(4, 4), normed, nn.Linear(5, 3))


def _clones() -> nn.Module:
    """DETR: layers are deep copies of one, in a list that is made before it becomes a module."""
    layer = nn.TransformerDecoderLayer(6, 2, 10, dropout=0.0)
    clones = nn.ModuleList([copy.deepcopy(layer) for _ in range(3)])
    for parameter in clones.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    return clones


def _average() -> nn.Module:
    """A teacher beside its student, with a tied weight of its own."""
    student = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7, bias=False), nn.LayerNorm(7))
    student[1].weight = student[0].weight
    teacher = copy.deepcopy(student).requires_grad_(False)
    assert teacher[1].weight is teacher[0].weight and teacher[0].weight is not student[0].weight
    with torch.no_grad():
        for a, b in zip(teacher.parameters(), student.parameters(), strict=True):
            a.mul_(0.5).add_(b, alpha=0.25)
    return nn.ModuleList([student, teacher])


def _aliases() -> nn.Module:
    """Two parameters of one memory: what is written to one is written to the other, whenever."""
    first, second = nn.Linear(5, 7), nn.Linear(7, 5)
    second.weight = nn.Parameter(first.weight.t())
    third = nn.ParameterList([nn.Parameter(first.weight[1:3]), nn.Parameter(first.weight.data)])
    assert all(type(p) is nn.Parameter for p in (first.weight, second.weight, *third))
    model = nn.ModuleList([first, second, third])
    with torch.no_grad():
        nn.init.normal_(first.weight)
        nn.Linear(3, 3)
        third[0].fill_(2.0)
        second.weight[0].mul_(-1)
    return model


def _views() -> nn.Module:
    """Views that outlive the moment in which their parameter is there."""
    first, second = nn.Linear(5, 7), nn.Linear(5, 7)
    view, data = first.weight.detach()[2:], second.weight.data
    rows = [first.weight.detach()[i] for i in range(2)]
    third = nn.Linear(7, 7)
    view.mul_(3)
    torch.stack([rows[0], data[1]]).sum()
    data.copy_(first.weight)
    rows[0].add_(third.weight.detach().sum())
    first.register_buffer("start", first.weight.detach())
    first.rows = rows  # type: ignore[assignment]
    return nn.ModuleList([first, second, third])


def _assigned() -> nn.Module:
    """Other memory: assigned, of another parameter, cut from one vector, converted, from numpy."""
    model = nn.ModuleList([nn.Linear(3, 5) for _ in range(5)])
    model[0].weight.data = torch.randn(5, 3).t().contiguous().t()
    model[1].weight.data = model[0].weight.data
    nn.Linear(3, 3)
    model[0].weight.data.mul_(2)
    vector_to_parameters(parameters_to_vector(model[2].parameters()) * 2, model[2].parameters())
    model[3].to(torch.float64)
    model[3].weight.data.mul_(2)
    array = torch.arange(15.0).reshape(5, 3).numpy()
    model[4].weight = nn.Parameter(torch.from_numpy(array))
    nn.Linear(3, 3)
    model[4].weight.detach().numpy()[0] = 7
    return model


def _filled_by_one_rank() -> nn.Module:
    """The way of transformers: weight_norm inside GatheredParameters, and values that one rank writes."""
    conv, other = nn.Conv1d(4, 4, 5), nn.Linear(4, 4)
    with GatheredParameters(conv.weight, modifier_rank=0):
        conv = parametrizations.weight_norm(conv, name="weight", dim=2)
    kept = nn.Linear(3, 3)
    with GatheredParameters(other.weight, modifier_rank=0), torch.no_grad():
        if holder_of(other.weight) is None or torch.distributed.get_rank() == 0:
            other.weight.fill_(3.0)
            other.weight[1] = kept.weight.dim()
    kept.weight.data.mul_(2)
    return nn.ModuleList([conv, other, kept])


def _lazy() -> nn.Module:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3))
    model(torch.ones(1, 5))
    return model


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).transpose(-1, -2)

    def right_inverse(self, x: Tensor) -> Tensor:
        return x.triu()


def _parametrized() -> nn.Module:
    layers = nn.ModuleList([nn.Linear(5, 5) for _ in range(5)])
    parametrizations.orthogonal(layers[0])
    parametrizations.spectral_norm(layers[1])
    parametrize.register_parametrization(layers[2], "weight", Symmetric())
    parametrize.register_parametrization(layers[3], "weight", Symmetric())
    parametrize.remove_parametrizations(layers[3], "weight")
    parametrizations.weight_norm(layers[4])
    parametrize.remove_parametrizations(layers[4], "weight")
    return layers


MAKERS: dict[str, Make] = {
    "weight_norm": _wave,
    "parametrizations": _parametrized,
    "old norms": lambda: nn.Sequential(old_weight_norm(nn.Linear(5, 5)), old_spectral_norm(nn.Linear(5, 7))),
    "TransformerEncoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 10, dropout=0.0), 3),
    "Transformer": lambda: nn.Transformer(6, 2, 1, 2, 10, dropout=0.0),
    "clones": _clones,
    "average": _average,
    "aliases": _aliases,
    "views": _views,
    "assigned": _assigned,
    "GatheredParameters": _filled_by_one_rank,
    "lazy": _lazy,
    "recurrent": lambda: nn.LSTM(3, 5, num_layers=2),
}


def _plain(make: Make, dtype: torch.dtype = torch.float32) -> nn.Module:
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        return make()
    finally:
        torch.set_default_dtype(before)


def _inside(make: Make, config: dict[str, Any], **given: Any) -> nn.Module:
    torch.manual_seed(100 * torch.distributed.get_rank())
    with zero.Init(config=config, **given):
        return make()


def _whole(model: nn.Module) -> dict[str, Tensor]:
    with GatheredParameters(model.parameters()):
        return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _assert_partitioned(model: nn.Module, name: str) -> None:
    if name != "lazy":  # which has its shape when it has run
        assert all(p.untyped_storage().nbytes() == 0 for p in model.parameters())
        error_of(next(model.parameters()).sum, AbsentParameterError)


def _builds(transport: str, name: str) -> None:
    make, config = MAKERS[name], config_for(3, transport)
    plain, model = _plain(make), _inside(make, config)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    _assert_partitioned(model, name)
    for _ in range(2):
        assert_same_weights(_whole(model), dict(plain.state_dict()), name)
    _assert_partitioned(model, name)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert (a.requires_grad, a.shape, a.stride()) == (b.requires_grad, b.shape, b.stride())
    if any(p.dtype == torch.float64 for p in plain.parameters()):
        return
    engine = partita.Engine(model=model, config=config)
    assert_same_weights(engine.module_state_dict(), dict(plain.state_dict()), name)
    engine.destroy()


@pytest.mark.parametrize("name", MAKERS)
def test_a_constructor_means_what_it_means_without_init(ranks, name):
    """F40: names, values, strides; before and after an engine has taken the model."""
    for path in TRANSPORTS:
        ranks(2).run(_builds, path, name)
    ranks(3).run(_builds, TRANSPORTS[0], name)


def _copies_in_turn(transport: str) -> None:
    held: list[int] = []

    with zero.Init(config=config_for(3, transport)):
        layer = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        copies = []
        for _ in range(4):
            copies.append(copy.deepcopy(layer))
            held.append(sum(p.untyped_storage().nbytes() for c in (layer, *copies) for p in c.parameters()))
        copies.append(pickle.loads(pickle.dumps(layer)))
        model = nn.ModuleList(copies)
        dropped = nn.Linear(64, 64)
        dropped_weight = weakref.ref(dropped.weight)
        del dropped
    # The memory of two weights: of one that is copied, and of its copy.
    assert max(held) <= 2 * 4 * 65 * 64, held
    with GatheredParameters(model.parameters()):
        first, *others = [[p.detach().clone() for p in c.parameters()] for c in copies]
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    gc.collect()
    assert dropped_weight() is None


@pytest.mark.parametrize("path", TRANSPORTS)
def test_copies_are_partitioned_as_they_are_made(ranks, path):
    """A list of layers may be as large as the model. What a constructor drops is gone when the block ends."""
    ranks(2).run(_copies_in_turn, path)
