"""Where a model may be, and which backend carries its tensors; with the "meta" device as the one that is wrong."""

from __future__ import annotations

from typing import Any

import partita
import pytest
import torch
from partita.comm import SingleProcess, backend_for
from partita.device.streams import HostStreams, streams_of
from partita.model import device_of
from small_models import Regression, config, inputs, seeded
from torch import nn


def on_meta(*names: str) -> Any:
    """A model whose named parameters or buffers are on the meta device; "all": the whole model."""

    def make() -> nn.Module:
        model = Regression()
        model.register_buffer("running", torch.ones(3))
        model.first.register_buffer("mask", torch.ones(5))
        if "all" in names:
            return model.to("meta")
        for name in names:
            owner = model.get_submodule(name.rpartition(".")[0])
            attribute, tensor = name.rpartition(".")[2], operator_of(model, name)
            moved = tensor.to("meta")
            setattr(owner, attribute, nn.Parameter(moved) if isinstance(tensor, nn.Parameter) else moved)
        return model

    return make


def operator_of(model: nn.Module, name: str) -> torch.Tensor:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}[name]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (on_meta("all"), ["'first.weight'", "device 'meta'", "CPU", "CUDA", "to_empty()"]),
        (on_meta("first.weight"), ["'first.weight'", "device 'meta'", "to_empty()"]),
        (on_meta("second.bias"), ["parameter 'second.bias'", "'meta'", "the model on 'cpu'", "to_empty()"]),
        (on_meta("running"), ["buffer 'running'", "'meta'", "the model on 'cpu'"]),
        (on_meta("first.mask"), ["buffer 'first.mask'", "'meta'", "the model on 'cpu'"]),
    ],
)
def test_a_model_in_the_wrong_place_is_refused_by_name(make, words):
    """Promise 7; and afterwards nothing of the engine is left on its parameters."""
    model = seeded(make)
    with pytest.raises(ValueError) as error:
        partita.Engine(model, config=config())
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_frozen_parameter_in_the_wrong_place_is_refused_by_name():
    model = seeded(on_meta("second.bias"))
    model.second.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"parameter 'second\.bias' is on device 'meta', the model on 'cpu'"):
        partita.Engine(model, config=config())


def test_the_device_is_that_of_the_first_parameter_or_buffer():
    assert device_of(Regression()) == torch.device("cpu")
    assert device_of(nn.Identity()) == torch.device("cpu")
    model = nn.Identity()
    model.register_buffer("running", torch.ones(3, device="meta"))
    with pytest.raises(ValueError, match="'running' is on device 'meta'"):
        device_of(model)


def test_streams_and_backend_follow_from_the_device():
    assert isinstance(streams_of(torch.device("cpu")), HostStreams)
    with pytest.raises(ValueError, match=r"'meta'.*CPU.*CUDA"):
        streams_of(torch.device("meta"))
    assert backend_for(torch.device("cpu")) == "gloo"
    assert backend_for(torch.device("cuda", 3)) == "nccl"


def test_the_engine_and_its_communicator_know_the_device():
    engine = partita.Engine(seeded(), config=config())
    assert engine.device == torch.device("cpu")
    assert engine.train_batch(inputs()).device == engine.device
    assert SingleProcess(torch.device("cuda", 1)).device == torch.device("cuda", 1)
