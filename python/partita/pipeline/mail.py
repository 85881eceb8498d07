"""Messages between the ranks of a pipeline: payloads forwards, gradients backwards, one queue per pair of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from partita.comm import Communicator, Handle
from partita.pipeline.arrival import Arrival
from partita.pipeline.outbox import Outbox
from partita.pipeline.payload import (
    HEADER,
    Form,
    Leaf,
    form_of_header,
    message_bytes,
    room_for,
    taken_apart,
    tensors_in,
)
from partita.pipeline.prove import Sent


class Mail:
    """What the stages of this rank give to each other and to those of other ranks in one step.

    The form of a payload travels once per step and edge, before the first payload. Micro-batches whose inputs have
    other shapes are of another class, and have forms of their own. Gradients have the form of the payload that they
    belong to.

    Args:
        pipe: the ranks of the pipeline.
        outbox: sends to them.
        classes: of each micro-batch.
    """

    def __init__(self, pipe: Communicator, outbox: Outbox, classes: Sequence[int]) -> None:
        self._pipe = pipe
        self._outbox = outbox
        self._classes = classes
        self._forms: dict[tuple[int, int, int], Form] = {}  # by edge and class
        self._here: dict[Sent, list[Tensor]] = {}

    def give(self, item: Sent, payload: Any, rank: int | None) -> list[Tensor]:
        """Hands a payload on to the stage that takes it; returns its tensors whose gradients come back.

        Args:
            rank: that has the taking stage; None: this one.

        Raises:
            ValueError: the payload has another form than that of an earlier micro-batch of the same class.
            TypeError: the payload cannot be described.
        """
        form, tensors = taken_apart(payload)
        _, stage, m, taker = item
        known = self._forms.setdefault((stage, taker, self._classes[m]), form)
        if known != form:
            raise ValueError(
                f"stage {stage} hands on {_shown(form)} in micro-batch {m}, and {_shown(known)} in an earlier one "
                "whose inputs had the same shapes: what a stage returns must follow from the shapes of its inputs, and "
                "so must what has a gradient, and numbers (one that changes goes as a tensor)"
            )
        if rank is None:
            self._here[item] = [tensor.detach().clone() for tensor in tensors]  # which the other stage may change
        else:
            if known is form:
                self._outbox.send([self._pipe.to_device(form.to_header())], [HEADER], rank)
            if message_bytes(form.tensors):
                self._outbox.send(tensors, form.tensors, rank)
        return [tensor for tensor in tensors if tensor.requires_grad]

    def give_back(self, item: Sent, gradients: Sequence[Tensor], rank: int | None) -> None:
        """Hands the gradients of a payload back to the stage that has made it. rank: that has the stage; None: this
        one."""
        if rank is None:
            self._here[item] = list(gradients)
        else:
            _, stage, m, taker = item
            leaves = self._forms[taker, stage, self._classes[m]].gradients
            if message_bytes(leaves):
                self._outbox.send(gradients, leaves, rank)

    def receive(self, items: Sequence[tuple[int, Sent]]) -> None:
        """Receives these, each from its rank, in this order; all of them are here afterwards."""
        posted: list[Handle] = []
        for rank, item in items:
            leaves = self._leaves(item, rank)
            room = room_for(leaves, self._pipe.device)
            self._here[item] = tensors_in(room, leaves)
            if message_bytes(leaves):
                posted.append(self._pipe.recv(room, rank))
        for handle in posted:
            handle.wait()

    def take(self, item: Sent) -> tuple[Any, list[Arrival]]:
        """The payload of a stage; and those of its tensors whose gradients are to be given back, if autograd is
        enabled."""
        _, stage, m, taker = item
        form = self._forms[stage, taker, self._classes[m]]
        tensors = self._here.pop(item)
        arrivals = []
        if torch.is_grad_enabled():
            for i, leaf in enumerate(form.tensors):
                if leaf.is_differentiable:
                    arrivals.append(arrival := Arrival(tensors[i]))
                    tensors[i] = arrival.tensor
        return form.put_together(tensors), arrivals

    def take_back(self, item: Sent) -> list[Tensor]:
        """The gradients of a payload."""
        return self._here.pop(item)

    def _leaves(self, item: Sent, rank: int) -> list[Leaf]:
        """Of the message that comes next from a rank. Forms that are not known come before it."""
        what, stage, m, taker = item
        if what == "B":
            return self._forms[taker, stage, self._classes[m]].gradients
        key = (stage, taker, self._classes[m])
        if key not in self._forms:
            header = room_for([HEADER], self._pipe.device)
            self._pipe.recv(header, rank).wait()
            self._forms[key] = form_of_header(self._pipe.to_host(header))
        return self._forms[key].tensors


def _shown(form: Form) -> str:
    """For people."""
    return ", ".join(map(_shown_leaf, form.leaves)) or "nothing"


def _shown_leaf(leaf: Any) -> str:
    if not isinstance(leaf, Leaf):
        return repr(leaf)
    without = "" if leaf.is_differentiable or not leaf.dtype.is_floating_point else " without gradient"
    return f"{str(leaf.dtype).removeprefix('torch.')} {leaf.shape}{without}"
