"""Full parameters that are there only while they compute (ZeRO stage 3).

[Note: lifetimes]
A group is what one module needs. The group's parameters arrive before the module's forward and are released after the
forward. A hook on the module's outputs brings the parameters back when the gradients of the outputs arrive. Autograd
runs the operations of a backward in the reverse order of their forward. So when a backward reaches another block, the
backward is done with this one. The root is the model without its blocks. The root's parameters stay from the beginning
of a forward to the end of backward, whether the model is called or only one of its modules.

In a recomputed forward (activation checkpointing) nothing is released: the backward of the same module follows at once.

[Note: order of gathers]
Where parameters are gathered by collectives, all ranks must issue the same collectives in the same order, whatever each
rank uses. A pass is a forward or a backward. The rules are:

1. In every pass every block is gathered once. The order is the one in which the first forward used the blocks, if all
   ranks used the blocks in the same order; else the order of the model. A backward takes the reverse.
2. A block that a rank skips is gathered and released there.
3. Before the gradients of a unit are reduced, the unit's block has been sent for.
4. Before a rank waits for a block, the rank reduces the units of blocks that come earlier in backward. When autograd
   reaches an operation, autograd is done with all later operations. So blocks that the forward used only later, or not
   at all, get no gradient any more.
5. A block that is used again after its turn is gathered again, and then all ranks must use the block again.

With rules 3 and 4, no rank can wait for a gather of a rank that waits for a reduction. Where ranks share memory nothing
is gathered, and none of the rules apply.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from partita.comm import CommunicationError, Communicator, ranks_that_differ
from partita.units.build import ParameterGroup
from partita.units.gather_pass import GatherPass
from partita.units.parameters import FlatParameters


class ParameterLifetimes:
    """Brings the parameters of a model's modules when the modules compute, and releases them afterwards.

    Args:
        groups: the blocks, and the model last.
        communicator: of the gathers; None where there is nothing to gather.
        prefetch_numel: while one group computes, the next group of the pass is sent for. Further groups are sent for as
            long as they have together at most so many elements.
        max_live_numel: no group is sent for ahead of its turn if more elements than this would be here.
        no_more_gradients: called with units that get no gradient any more in the backward under way.
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
        self._used: list[int] | None = []  # blocks in this rank's first forward; None: the order is settled
        self._pass: GatherPass | None = None  # under way
        self._live: set[int] = set()  # groups that have been sent for and not released
        self._depth = 0  # of nested modules whose forward runs
        # A clock that tells which use of a block came first. It ticks at every forward and at every use of a block.
        self._uses = 0
        self._old_uses = 0  # what the clock showed when this micro-batch began
        self._first_use: dict[int, int] = {}  # block -> when this micro-batch used it first
        self._counts_uses = False  # whether a backward may follow the forward under way
        self._owner = {id(unit): i for i, group in enumerate(groups) for unit in group.units}
        self._hooks: list[RemovableHandle] = []
        if self._owner:
            self._watch()

    def _watch(self) -> None:
        own = weakref.ref(self)  # a model may outlive its engine, and its hooks must not keep the engine alive
        block_of = {group.module: i for i, group in enumerate(self.groups[: self._root])}
        inside = {module for block in block_of for module in block.modules()} - block_of.keys()
        model = self.groups[self._root].module
        for module in model.modules():
            # Leaves outside of blocks are called by other modules, which have the hooks. Hooks of the leaves would only
            # cost time.
            if module in inside or not (module in block_of or module is model or any(True for _ in module.children())):
                continue
            i = block_of.get(module, self._root)
            # The parameters must be here before other hooks of the module run, and when the forward raises they must be
            # released all the same.
            self._hooks.append(module.register_forward_pre_hook(partial(_before_forward, own, i), prepend=True))
            self._hooks.append(module.register_forward_hook(partial(_after_forward, own, i), always_call=True))

    @property
    def gathered_bytes(self) -> int:
        """Memory of full parameters on this rank, now."""
        return sum(unit.residence.gathered_bytes for group in self.groups for unit in group.units)

    def before_reduction(self, unit: FlatParameters) -> None:
        """The gradients of a unit are about to be reduced: rule 3 of [Note: order of gathers]."""
        owner = self._owner.get(id(unit), self._root)
        if self._pass is not None and self._pass.is_to_come(owner):
            self._live |= {*self._pass.up_to(owner), owner}

    def gather_rest(self, _unit: FlatParameters) -> None:
        """Takes the place of `before_reduction` where all reductions follow the backward of this rank."""
        if self._pass is not None:
            for i in self._pass.rest():
                self._release([i])

    def begin_backward(self) -> None:
        """Gradients are about to arrive."""
        if self._pass is None:
            self._pass = GatherPass(reversed(self._order), self.groups)
            if self._root not in self._live:
                # Every rank brings the root, whether the gradients of this rank come through modules or not.
                self._need(self._root)

    def end_backward(self) -> None:
        """Backward is over: nothing needs full parameters any more."""
        self.begin_backward()  # a rank whose gradients came through no module takes part in the gathers of the others
        self._end_pass(stays=set())

    def forget_forwards(self) -> None:
        """A new micro-batch begins."""
        self._old_uses = self._uses
        self._first_use.clear()

    def release_all(self) -> None:
        """Nothing computes. Legal in the middle of a pass too, after an error for instance."""
        self._pass = None
        self._depth = 0
        self._release(range(len(self.groups)))

    def close(self) -> None:
        """Removes the hooks from the model and releases all parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.release_all()

    def _need(self, index: int) -> None:
        """A group computes now: waits for the group, and sends for the groups that follow in this pass."""
        current = self._pass or GatherPass([], self.groups)
        try:
            skipped = current.up_to(index) if current.is_to_come(index) else []
            current.start_gather(index)  # does nothing unless this is the root, or a block whose turn was before
            self._live |= {index, *skipped}
            # Prefetching starts before the wait, so that the next gathers go on beside this group's computing.
            current.ahead(self._prefetch_numel, self._max_live_numel - sum(self.groups[i].numel for i in self._live))
            for unit in self.groups[index].units:
                unit.residence.wait()
        except CommunicationError:
            self._pass = None  # modules that this error leaves do not gather the rest
            raise
        self._release(skipped)  # after the wait: the skipped ones came before, so releasing them waits for nothing

    def _release(self, indices: Iterable[int]) -> None:
        for i in list(indices):
            for unit in self.groups[i].units:
                unit.residence.release()
            self._live.discard(i)

    def _before_forward(self, index: int) -> None:
        # In a backward this is a recomputed forward: part of the backward's pass, and no new use of a block.
        if not _in_backward():
            self._depth += 1
            if self._depth == 1:
                self._pass = GatherPass(self._order, self.groups)
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

    def _after_forward(self, index: int, outputs: Any) -> None:
        in_backward = _in_backward()
        if not in_backward:
            self._depth -= 1
        is_outermost = not in_backward and self._depth == 0
        if torch.is_grad_enabled() and (is_outermost or index != self._root):
            # The time 0 is before any micro-batch: a recomputed forward tells nothing of what comes later in backward.
            hook = partial(_before_backward, weakref.ref(self), index, 0 if in_backward else self._uses)
            for output in pytree.tree_leaves(outputs):
                # A tensor that a module passes on unchanged was made by the module before, which has its hook there.
                if isinstance(output, Tensor) and output.requires_grad and not hasattr(output, "_partita_made"):
                    output._partita_made = True  # type: ignore[attr-defined]
                    output.register_hook(hook)  # type: ignore[no-untyped-call]
        if is_outermost:
            self._end_pass(stays={self._root} if torch.is_grad_enabled() else set())
            self._settle_order()
        elif index != self._root and not in_backward:
            self._release([index])

    def _before_backward(self, index: int, use: int) -> None:
        """The gradient of an output of a group's module is there; the output was made at the time `use`."""
        self.begin_backward()
        if self._communicator is not None and use > self._old_uses:  # rule 4 of [Note: order of gathers]
            done = [i for i in range(self._root) if self._first_use.get(i, use + 1) > use]
            self._no_more_gradients(unit for i in done for unit in self.groups[i].units)
        if index != self._root:
            self._release(self._live - {index, self._root})
            self._need(index)

    def _end_pass(self, stays: set[int]) -> None:
        """Gathers and releases, one by one, the blocks whose turn has not come: other ranks use these blocks."""
        self._release(self._live - stays)
        if self._pass is not None:
            for i in self._pass.rest():
                self._release([i])
            self._pass = None

    def _settle_order(self) -> None:
        """After the first forward: adopts the order in which it used the blocks, if that is the same on all ranks."""
        if self._used is None or self._communicator is None or not self._root:
            return
        if all(unit.residence.is_pinned for group in self.groups for unit in group.units):
            self._used = []  # where all is pinned, ranks may do different things, and some of them nothing
            return
        used = [*self._used, *(i for i in range(self._root) if i not in self._used)]
        self._used = None
        if not ranks_that_differ(self._communicator, repr(used).encode()):
            self._order = used


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


# The hooks. They are functions over a weak reference: a bound method would keep the lifetimes, and with them the units.


def _before_forward(own: weakref.ref[ParameterLifetimes], index: int, _module: nn.Module, _inputs: Any) -> None:
    if (lifetimes := own()) is not None:
        lifetimes._before_forward(index)


def _after_forward(
    own: weakref.ref[ParameterLifetimes], index: int, _module: nn.Module, _inputs: Any, outputs: Any
) -> None:
    if (lifetimes := own()) is not None:
        lifetimes._after_forward(index, outputs)


def _before_backward(own: weakref.ref[ParameterLifetimes], index: int, use: int, _grad: Tensor) -> None:
    if (lifetimes := own()) is not None:
        lifetimes._before_backward(index, use)
