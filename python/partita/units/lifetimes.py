"""Full parameters that are there only while they compute (ZeRO stage 3).

[Note: lifetimes]
A group is what one module needs. It arrives before the module's forward and is released after it. A hook on the outputs
brings it back when their gradients arrive. Autograd runs the operations of a backward in the reverse order of their
forward, so when it reaches another block, it is done with this one. The root (what is outside of blocks) stays from the
beginning of the model's forward, or of whatever module of it is called by itself, to the end of backward.

In a recomputed forward (activation checkpointing) nothing is released: its backward follows at once.

[Note: order of gathers]
Where parameters are gathered by collectives, all ranks issue the same ones in the same order, whatever each of them
uses: in every pass (a forward, a backward) every block once, in the order in which the blocks were used in the first
forward, if all ranks used them in the same order, else in the order of the model. A block that a rank skips is gathered
and released there. Before a unit's gradients are reduced, its block has been sent for; and before a rank waits for a
block, it reduces those that come earlier in backward: when autograd reaches an operation, it is done with all later
ones, so blocks that the forward used only later, or not at all, get no gradient any more. With that, no rank can wait
for a gather of a rank that waits for a reduction. A block that is used again after its turn is gathered again, and then
all ranks must use it again. Where ranks share memory there is nothing to gather, and none of this applies.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from partita.comm import CommunicationError, Communicator
from partita.units.build import ParameterGroup
from partita.units.parameters import FlatParameters


class ParameterLifetimes:
    """Brings the parameters of a model's modules when these compute, and releases them.

    Args:
        groups: the blocks, and the model last.
        communicator: of the gathers; None where there is nothing to gather.
        prefetch_numel: the next group of a pass is sent for while one computes, and further ones while they have
            together at most so many elements.
        max_live_numel: nothing is sent for ahead that would bring more elements than this here.
        no_more_gradients: hears of units that get none any more in a backward.
    """

    def __init__(
        self,
        groups: list[ParameterGroup],
        communicator: Communicator | None,
        prefetch_numel: int,
        max_live_numel: int,
        no_more_gradients: Callable[[Iterable[FlatParameters]], None],
    ) -> None:
        self.groups = groups
        self._communicator = communicator
        self._prefetch_numel = prefetch_numel
        self._max_live_numel = max_live_numel
        self._no_more_gradients = no_more_gradients
        self._root = len(groups) - 1
        self._order = list(range(self._root))  # of the blocks in a forward
        self._used: list[int] | None = []  # in the first forward, by this rank; None: the order is settled
        self._pass: _Pass | None = None  # under way
        self._live: set[int] = set()  # groups that have been sent for
        self._depth = 0  # of modules whose forward runs
        self._uses = 0  # forwards, and in them uses of blocks
        self._old_uses = 0  # those before this micro-batch
        self._first_use: dict[int, int] = {}  # of each block in this micro-batch
        self._counts_uses = False  # in the forward under way
        self._owner = {id(unit): i for i, group in enumerate(groups) for unit in group.units}
        self._hooks: list[RemovableHandle] = []
        if self._owner:
            self._watch()

    def _watch(self) -> None:
        own = weakref.ref(self)
        block_of = {group.module: i for i, group in enumerate(self.groups[: self._root])}
        inside = {module for block in block_of for module in block.modules()} - block_of.keys()
        model = self.groups[self._root].module
        for module in model.modules():
            # Leaves outside of blocks are called by others; hooks there would only cost time.
            if module in inside or not (module in block_of or module is model or any(True for _ in module.children())):
                continue
            i = block_of.get(module, self._root)
            before, after = partial(_call, own, "_before_forward", i), partial(_call, own, "_after_forward", i)
            self._hooks.append(module.register_forward_pre_hook(before, prepend=True))
            self._hooks.append(module.register_forward_hook(after, always_call=True))

    @property
    def gathered_bytes(self) -> int:
        """Memory of full parameters on this rank, now."""
        return sum(unit.gathered_bytes for group in self.groups for unit in group.units)

    def before_reduction(self, unit: FlatParameters) -> None:
        """The gradients of a unit are about to be reduced. See [Note: order of gathers]."""
        owner = self._owner.get(id(unit), self._root)
        if self._pass is not None and self._pass.is_to_come(owner):
            self._live |= {*self._pass.up_to(owner), owner}

    def gather_rest(self, _unit: FlatParameters) -> None:
        """Instead of `before_reduction`, where all reductions follow the backward of this rank."""
        if self._pass is not None:
            for i in self._pass.rest():
                self._release([i])

    def begin_backward(self) -> None:
        """Gradients are about to arrive."""
        if self._pass is None:
            self._pass = _Pass(reversed(self._order), self.groups)
            if self._root not in self._live:
                self._need(self._root)  # on every rank, whether its gradients come through modules or not

    def end_backward(self) -> None:
        """Backward is over: nothing needs full parameters any more."""
        self.begin_backward()  # if no gradient came through any module of this rank
        self._end_pass(stays=set())

    def forget_forwards(self) -> None:
        """A new micro-batch begins."""
        self._old_uses = self._uses
        self._first_use.clear()

    def release_all(self) -> None:
        """Nothing computes, in the middle of a pass too: after an error, say."""
        self._pass = None
        self._depth = 0
        self._release(range(len(self.groups)))

    def close(self) -> None:
        """Lets go of the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.release_all()

    def _need(self, index: int) -> None:
        """A group computes now; what comes after it in this pass is sent for."""
        current = self._pass or _Pass([], self.groups)
        try:
            skipped = current.up_to(index) if current.is_to_come(index) else []
            current.send_for(index)  # the root, or a block whose turn was before
            self._live |= {index, *skipped}
            current.ahead(self._prefetch_numel, self._max_live_numel - sum(self.groups[i].numel for i in self._live))
            for unit in self.groups[index].units:
                unit.arrive()
        except CommunicationError:
            self._pass = None  # modules that this error leaves do not gather the rest
            raise
        self._release(skipped)

    def _release(self, indices: Iterable[int]) -> None:
        for i in list(indices):
            for unit in self.groups[i].units:
                unit.release()
            self._live.discard(i)

    def _before_forward(self, index: int, _module: nn.Module, _inputs: Any) -> None:
        if not _in_backward():
            self._depth += 1
            if self._depth == 1:
                self._pass = _Pass(self._order, self.groups)
                self._counts_uses = torch.is_grad_enabled()
                self._uses += 1
            if self._counts_uses and index != self._root:
                self._uses += 1
                self._first_use.setdefault(index, self._uses)
        if self._root not in self._live:
            self._need(self._root)
        if index != self._root:
            if self._used is not None and index not in self._used:
                self._used.append(index)
            self._need(index)

    def _after_forward(self, index: int, _module: nn.Module, _inputs: Any, outputs: Any) -> None:
        in_backward = _in_backward()
        if not in_backward:
            self._depth -= 1
        is_outermost = not in_backward and self._depth == 0
        if torch.is_grad_enabled() and (is_outermost or index != self._root):
            hook = partial(_call, weakref.ref(self), "_before_backward", index, 0 if in_backward else self._uses)
            for output in pytree.tree_leaves(outputs):
                # What a module hands on unchanged was made by the one before it, which has its hook there.
                if isinstance(output, Tensor) and output.requires_grad and not hasattr(output, "_partita_made"):
                    output._partita_made = True  # type: ignore[attr-defined]
                    output.register_hook(hook)  # type: ignore[no-untyped-call]
        if is_outermost:
            self._end_pass(stays={self._root} if torch.is_grad_enabled() else set())
            self._settle_order()
        elif index != self._root and not in_backward:
            self._release([index])

    def _before_backward(self, index: int, use: int, _grad: Tensor) -> None:
        self.begin_backward()
        if self._communicator is not None and use > self._old_uses:
            done = [i for i in range(self._root) if self._first_use.get(i, use + 1) > use]
            self._no_more_gradients(unit for i in done for unit in self.groups[i].units)
        if index != self._root:
            self._release(self._live - {index, self._root})
            self._need(index)

    def _end_pass(self, stays: set[int]) -> None:
        """The groups whose turn has not come are gathered and released one by one: other ranks use them."""
        self._release(self._live - stays)
        if self._pass is not None:
            for i in self._pass.rest():
                self._release([i])
            self._pass = None

    def _settle_order(self) -> None:
        """After the first forward: the order in which its blocks were used, if it is the same on all ranks."""
        if self._used is None or self._communicator is None or not self._root:
            return
        if all(unit.is_held for group in self.groups for unit in group.units):
            self._used = []  # ranks may do different things, and some of them nothing
            return
        used = [*self._used, *(i for i in range(self._root) if i not in self._used)]
        self._used = None
        table = torch.zeros(self._communicator.world_size * self._root)
        self._communicator.slice_of(table).copy_(torch.tensor(used))
        table = table.to(self._communicator.device)
        self._communicator.all_gather(table).wait()
        if bool((table.view(-1, self._root) == torch.tensor(used, device=table.device)).all()):
            self._order = used


class _Pass:
    """One way through the blocks: which of them have been sent for."""

    def __init__(self, order: Iterable[int], groups: Sequence[ParameterGroup]) -> None:
        self._left = list(order)
        self._groups = groups
        self._ahead: list[int] = []  # sent for, and not needed yet

    def is_to_come(self, index: int) -> bool:
        """Whether this block has not been needed yet."""
        return index in self._ahead or index in self._left

    def up_to(self, index: int) -> list[int]:
        """Sends for all blocks to this one, which is to come. Returns those in between, which this rank skips."""
        skipped, self._ahead = self._ahead, []
        if index in skipped:
            self._ahead = skipped[skipped.index(index) + 1 :]
            return skipped[: skipped.index(index)]
        while (first := self._left.pop(0)) != index:
            self.send_for(first)
            skipped.append(first)
        self.send_for(index)
        return skipped

    def ahead(self, numel: int, room: int) -> None:
        """Sends for the next one, and for more while they have at most `numel` elements; all within `room`."""
        sent = sum(self._groups[i].numel for i in self._ahead)
        while self._left:
            sent += self._groups[self._left[0]].numel
            if sent > room or (self._ahead and sent > numel):
                return
            self._ahead.append(self._left.pop(0))
            self.send_for(self._ahead[-1])

    def rest(self) -> Iterable[int]:
        """What was not needed, one by one."""
        while self._ahead:
            yield self._ahead.pop(0)
        while self._left:
            self.send_for(self._left[0])
            yield self._left.pop(0)

    def send_for(self, index: int) -> None:
        """Whatever the order."""
        for unit in self._groups[index].units:
            unit.send_for()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _call(lifetimes: weakref.ref[ParameterLifetimes], method: str, index: int, *args: Any) -> None:
    """Hooks hold no reference: a model may outlive its engine."""
    if (alive := lifetimes()) is not None:
        call: Callable[..., None] = getattr(alive, method)
        call(index, *args)
