"""What all ranks of a job must be given alike, in words: compared before the first collective."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from partita.comm import Entries
from partita.config import rank_local_keys
from partita.device import kernels
from partita.optim import group_entries
from partita.units import holder_of

if TYPE_CHECKING:
    from partita.config import Config


def shared_by_ranks(
    config: Config, of_model: Entries, optimizer: Optimizer | None, lr_scheduler: Any, train_data: Any
) -> Entries:
    """(name, value) of the config without what may differ, of the optimizer and its groups, the model and the data.

    of_model: what the ranks know of the model, see `model_entries`.

    What may differ: reports, timeouts and pinned memory; the index of a device; the values of weights and buffers, as
    those of rank 0 count; random states.
    """
    return [
        *_of_config(config, shuffles=train_data is not None),
        *_of_data(train_data),
        ("the class of the optimizer", "none" if optimizer is None else type(optimizer).__name__),
        ("the class of the lr_scheduler", "none" if lr_scheduler is None else type(lr_scheduler).__name__),
        *of_model,
        *(() if optimizer is None else group_entries(optimizer)),
    ]


def _of_config(config: Config, *, shuffles: bool) -> Iterator[tuple[str, str]]:
    local = rank_local_keys()
    for key, value in _leaves("", config.model_dump()):
        if key not in local and (shuffles or key != "seed"):  # which only orders the data
            yield key, str(value)


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(f"{path}.{key}" if path else str(key), inner)
    else:
        yield path, value


def _of_data(train_data: Any) -> Iterator[tuple[str, str]]:
    kind = "none" if train_data is None else type(train_data).__name__
    yield "the class of the training data", kind
    with suppress(TypeError):  # a loader over a stream says that it has no length
        if hasattr(train_data, "__len__"):
            yield "the number of samples in the training data", str(len(train_data))


def model_entries(model: nn.Module, optimizer: Optimizer | None) -> Entries:
    """(name, value) of what a model is, and which of its parameters are trained."""
    return list(_of_model(model, optimizer))


def _of_model(model: nn.Module, optimizer: Optimizer | None) -> Iterator[tuple[str, str]]:
    groups = {} if optimizer is None else {p: i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
    for name, parameter in model.named_parameters():
        yield f"parameter {name}", _form(parameter)
        yield f"the dtype of parameter {name}", str(parameter.dtype)
        yield f"requires_grad of parameter {name}", str(parameter.requires_grad)
        yield f"the device of parameter {name}", parameter.device.type
        yield f"the optimizer group of parameter {name}", str(groups.get(parameter))
        if holder_of(parameter) is not None:
            yield f"parameter {name} before initialize()", "partitioned"
    for name, buffer in model.named_buffers():
        yield f"buffer {name}", f"{_form(buffer)} of {buffer.dtype}"


def _form(tensor: Tensor) -> str:
    """The shape, where there is one: a nested or a lazy tensor is refused later, by name."""
    return kernels.why_no_memory(tensor) or str(tuple(tensor.shape))
