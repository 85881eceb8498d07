"""What FusedAdam keeps between steps: where parameters and their states are; the control block of a step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from partita import _core
from partita._core import AdamPart
from partita.device import HOST, kernels
from partita.device.capability import prepare_kernels

MOMENTS = ("exp_avg", "exp_avg_sq")
_dtype = attrgetter("dtype")
_version = attrgetter("_version")
_moments = itemgetter(*MOMENTS)
State = dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """Parameters of one device that take a step of the same number; `members` are their places in the plan."""

    device: torch.device
    members: list[int]
    parts: list[kernels.Part[AdamPart]]


class Plan:
    """The update of some parameters: it can be repeated as long as no memory but that of gradients moves.

    What is asked of every parameter in each step is asked in lists, as asking one by one takes several times as long.

    Args:
        parameters: those that have a gradient.
        groups: the index of each one's group.
        grads: contiguous gradients. The plan does not keep them.
        state: of the optimizer. What a parameter lacks there is added.

    Raises:
        TypeError, ValueError: tensors that the native core cannot update.
    """

    def __init__(
        self, parameters: list[Tensor], groups: list[int], grads: list[Tensor], state: dict[Tensor, State]
    ) -> None:
        self._parameters, self._groups = parameters, groups
        self._states = [_completed(state[parameter], parameter) for parameter in parameters]
        parts = [_part(*each) for each in zip(self._parameters, self._states, self._groups, grads, strict=True)]
        self._whole = (list(state.keys()), list(state.values()))
        self._tensors = _tensors_of(self._states)
        self._with_master = [i for i, of_one in enumerate(self._states) if "master" in of_one]
        self._grad_dtypes = list(map(_dtype, grads))
        self._places = self._facts()
        self._versions = list(map(_version, parameters))
        self._steps = [int(of_one["step"]) for of_one in self._states]
        members: dict[tuple[torch.device, int], list[int]] = {}
        for i, parameter in enumerate(parameters):
            members.setdefault((parameter.device, self._steps[i]), []).append(i)
        self._batches = [Batch(device, found, [parts[i] for i in found]) for (device, _), found in members.items()]

    def fits(
        self, parameters: list[Tensor], groups: list[int], grads: list[Tensor], state: dict[Tensor, State]
    ) -> bool:
        """Whether this is still the update of these parameters, and everything is where it was."""
        return (
            _are(self._parameters, parameters)
            and groups == self._groups
            and list(map(_dtype, grads)) == self._grad_dtypes
            and _are(self._whole[0], state.keys())
            and _are(self._whole[1], state.values())
            and _are(self._tensors, _tensors_of(self._states))
            and self._facts() == self._places
            and [of_one["step"] for of_one in self._states] == self._steps
        )

    def begin_step(self, grads: list[Tensor]) -> list[tuple[Batch, int]]:
        """What is updated together, with the number of the step. Parts read these gradients from now on; masters take
        over what others have written into their parameters."""
        versions = list(map(_version, self._parameters))
        if self._with_master and versions != self._versions:
            for i in self._with_master:
                if versions[i] != self._versions[i]:
                    kernels.adopt_written(self._states[i]["master"], self._parameters[i])
        self._versions = versions  # the native update does not count
        for batch in self._batches:
            kernels.move_grads(batch.parts, [grads[i] for i in batch.members])
        self._steps = [step + 1 for step in self._steps]
        for of_one, step in zip(self._states, self._steps, strict=True):
            of_one["step"] = step
        return [(batch, self._steps[batch.members[0]]) for batch in self._batches]

    def _facts(self) -> tuple[list[Any], ...]:
        """What native parts were made from, as far as others can change it in place."""
        parameters = self._parameters
        return (
            list(map(Tensor.data_ptr, parameters)),
            list(map(Tensor.data_ptr, self._tensors)),
            list(map(Tensor.numel, parameters)),
            list(map(_dtype, parameters)),
            list(map(Tensor.is_contiguous, parameters)),
        )


def _completed(state: State, parameter: Tensor) -> State:
    if not state:
        state["step"] = 0
        state.update({name: torch.zeros_like(parameter, dtype=torch.float32) for name in MOMENTS})
    if parameter.dtype != torch.float32:
        if "master" in state:
            kernels.adopt_written(state["master"], parameter)
        else:
            state["master"] = parameter.detach().float()
    return state


def _part(parameter: Tensor, state: State, group: int, grad: Tensor) -> kernels.Part[AdamPart]:
    return kernels.adam_part(
        grads=grad,
        master=state.get("master", parameter),
        exp_avg=state["exp_avg"],
        exp_avg_sq=state["exp_avg_sq"],
        params=parameter if "master" in state else None,
        segments=_core.Segments([(0, parameter.numel(), group)]),
    )


def _tensors_of(states: list[State]) -> list[Any]:
    """Moments and masters."""
    try:
        moments = list(chain.from_iterable(map(_moments, states)))
    except KeyError:  # somebody has taken them out
        return []
    return moments + [state["master"] for state in states if "master" in state]


def _are(known: list[Any], now: Iterable[Any]) -> bool:
    """Whether these are the same objects."""
    now = list(now)
    return len(known) == len(now) and all(map(is_, known, now))


class Control:
    """The control block of updates whose gradients are what they are, in memory of a device."""

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda" and _core.built_with_cuda():
            prepare_kernels(device)
        memory = torch.zeros(_core.StepControl.nbytes, dtype=torch.uint8, device=HOST)
        _core.StepControl(grad_norm=0.0, grad_scale=1.0, skip=False, step=0).write(kernels.address(memory))
        self._memory = memory.to(device)
        self._step = self._memory.view(torch.int64)[-1]

    def at(self, step: int) -> Tensor:
        """The block for this step. Nothing waits: the number is written in the order of the current stream."""
        self._step.fill_(step)
        return self._memory
