"""Full parameters that are there only while they compute (ZeRO stage 3).

[Note: lifetimes]
A group is what one module needs. The group's parameters arrive before the module's forward and are released after the
forward. The root is the model without its blocks. The root's parameters stay from the beginning of a forward to the end
of backward, whether the model is called or only one of its modules. Where parameters are mapped, all are in the root:
nothing is gained when they go, and so nothing watches what autograd saves of them.

Whether parameters are there in a backward does not depend on what modules return: what autograd saved asks for them,
see [Note: saved parameters] in `saved_tensors.py`. So does an absent parameter that is used while the model computes,
in a forward or in a backward: one of another block, say, or one that a Function of the program's keeps.

Hooks on the outputs of modules bring the parameters earlier, with the blocks that follow, and release what is done
with. Autograd runs the operations of a backward in the reverse order of their forward. So when a backward reaches
another block, the backward is done with this one. What a saved tensor asks for is kept until saved tensors of another
operation ask for more: one operation may need several blocks.

In a recomputed forward (activation checkpointing) nothing is released: the backward of the same module follows at once.

A backward that is recorded (`create_graph=True`) saves tensors of its own, which no hook sees. So parameters that are
released there leave their memory to these tensors. It goes when the graph goes. One thing cannot be helped: a Function
that keeps a parameter on its context, and not with `save_for_backward()`, cannot be differentiated twice.

[Note: order of gathers]
Where parameters are gathered by collectives, all ranks launch the same collectives in one order, whatever each rank
uses: gathers and reductions, though each kind has a communicator of its own. docs/design.md ("The order of
collectives") shows that no deadlock is possible then. A pass is a forward or a backward. A backward is one if it asks
for a parameter or trains; so a gradient that `autograd.grad()` takes is one, on all ranks or on none. The rules are:

1. In every pass every block is gathered once; in a forward of a module of the model, every block in it. The order is
   the one in which the first forward used the blocks, if all ranks used the blocks in the same order; else the order of
   the model. A backward takes the reverse, after the root. A block that a rank skips is gathered and released there.
2. How many blocks have been sent for at the turn of a block follows from the sizes of the blocks alone (`Ahead`).
3. Before the gradients of a unit are reduced, so many blocks have been sent for as at the turn of the unit's block, or
   of an earlier unit's if that is later. Before those of the root, all have been; till then they wait.
4. Before a rank sends for more blocks than that, it reduces the unit: in a backward that trains, at the turn of a
   block, the units of all blocks that come earlier. When autograd reaches an operation, autograd is done with all later
   ones. So blocks that the forward used only later, or not at all, get no gradient any more.
5. A block that is used again after its turn is gathered again, whoever asks: a module, a saved tensor or an absent
   parameter. Then all ranks must use the block again.

Ranks may have different graphs as long as each uses its blocks in turn; with the same graph they may do as they like.
Where ranks share memory nothing is gathered, and none of the rules apply.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from partita.comm import CommunicationError, Communicator
from partita.units.blocks import watched_modules
from partita.units.build import ParameterGroup
from partita.units.gather_pass import Ahead, BlockOrder, GatherPass, Reuses
from partita.units.graph_tasks import GraphTasks, current_operation, in_backward, next_operation
from partita.units.module_hooks import OwnHook, tensors_in
from partita.units.parameters import FlatParameters
from partita.units.reduction import BackwardConductor
from partita.units.residence import Residency
from partita.units.saved_tensors import SavedTensors


class ParameterLifetimes:
    """Brings the parameters of a model's modules when the modules compute, and releases them afterwards.

    Args:
        groups: the blocks, and the model last.
        communicator: of the gathers; None where there is nothing to gather.
        prefetch_numel: while one group computes, the next group of the pass is sent for. Further groups are sent for as
            long as they have together at most so many elements.
        max_live_numel: no group is sent for ahead of its turn if the root, the group that computes and those ahead
            would have more elements than this.
        conductor: of the backwards.
    """

    def __init__(
        self,
        groups: list[ParameterGroup],
        communicator: Communicator | None,
        prefetch_numel: int,
        max_live_numel: int,
        conductor: BackwardConductor,
    ) -> None:
        own = weakref.ref(self)  # a model may outlive its engine, and its hooks must not keep the engine alive
        self.groups = groups
        self._communicator = communicator
        self._conductor = conductor
        self._root = len(groups) - 1
        self._ahead = Ahead(prefetch_numel, max_live_numel - groups[self._root].numel)
        self._order = BlockOrder(self._root)
        self._reuses = None if communicator is None else Reuses(communicator)
        self._pass: GatherPass | None = None  # under way
        self._live: set[int] = set()  # groups that have been sent for and not released
        self._running: list[int] = []  # groups whose forward runs, the innermost last
        self._is_whole = False  # whether that is a forward of the whole model
        self._is_recording = False  # whether autograd was enabled when it began
        # Autograd numbers the operations in the order of their forward.
        self._began = 0  # the next operation when this micro-batch began
        self._first_use: dict[int, int] = {}  # block -> the next operation when this micro-batch used it first
        self._to_come: set[int] = set()  # blocks that the backward under way may still bring gradients to
        self._tasks = GraphTasks(partial(_backward_over, own))
        self._is_recorded: bool | None = None  # whether the backward under way has a graph of its own; None: unknown
        self._operation = -1  # whose saved tensors asked last
        self._asked: set[int] = set()  # groups that saved tensors have asked for since the operation before that
        self._units = [(i, unit) for i, group in enumerate(groups) for unit in group.units]  # by number
        self._number = {id(unit): number for number, (_, unit) in enumerate(self._units)}
        self._saved = None if communicator is None else SavedTensors(partial(_saved_asked, own))
        self._hooks: list[RemovableHandle] = []
        if self._units:
            self._watch(own)

    def _watch(self, own: weakref.ref[ParameterLifetimes]) -> None:
        for i, unit in self._units:
            unit.brings = partial(_bring, own, i)
        blocks = [group.module for group in self.groups[: self._root]]
        for module, index, inner in watched_modules(self.groups[self._root].module, blocks):
            i = self._root if index is None else index
            before = OwnHook(partial(_before_forward, own, i, inner))
            after = OwnHook(partial(_after_forward, own, i))
            # The parameters must be here before other hooks of the module run, and when the forward raises they must be
            # released all the same.
            self._hooks.append(module.register_forward_pre_hook(before, prepend=True))
            self._hooks.append(module.register_forward_hook(after, always_call=True))

    @property
    def gathered_bytes(self) -> int:
        """Memory of full parameters on this rank, now."""
        return sum(unit.residence.gathered_bytes for _, unit in self._units)

    def before_reduction(self, unit: FlatParameters) -> None:
        """The gradients of a unit are about to be reduced: rule 3 of [Note: order of gathers]."""
        if (owner := self._owner(unit)) == self._root:
            self.gather_rest()
        elif self._pass is not None:
            self._pass.before_reduction(owner)

    def may_reduce(self, unit: FlatParameters) -> bool:
        """Whether the gradients of a unit may be reduced before the backward under way is over: rule 3."""
        return self._pass is None or self._pass.is_sent or self._owner(unit) != self._root

    def gather_rest(self) -> None:
        """Sends for all blocks that have not been sent for. The backward under way uses none of them any more."""
        if self._pass is not None and not self._pass.is_sent:
            for i in self._pass.rest():
                self._release([i])

    def _owner(self, unit: FlatParameters) -> int:
        """The group of a unit; units that are always here count as the root's."""
        number = self._number.get(id(unit))
        return self._root if number is None else self._units[number][0]

    def begin_backward(self) -> None:
        """Gradients are about to arrive."""
        if self._pass is None:
            self._pass = GatherPass(reversed(self._order.blocks), self.groups, self._ahead)
            self._to_come = set(range(self._root))
            if self._root not in self._live:
                # Every rank brings the root, whether the gradients of this rank come through modules or not.
                self._need(self._root)

    def end_backward(self) -> None:
        """Backward is over: nothing needs full parameters any more."""
        self.begin_backward()  # a rank whose gradients came through no module takes part in the gathers of the others
        self._end_pass(stays=set())

    def forget_forwards(self) -> None:
        """A new micro-batch begins."""
        self._began = next_operation()
        self._first_use.clear()

    def release_all(self) -> None:
        """Nothing computes. Legal in the middle of a pass too, after an error for instance."""
        if self._saved is not None:
            self._saved.leave_all()
        self._tasks.forget()
        self._pass = None
        self._running.clear()
        self._release(range(len(self.groups)))
        self._is_recorded = None

    def close(self) -> None:
        """Removes the hooks from the model and releases all parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.release_all()
        for _, unit in self._units:
            unit.brings = None

    # -- gathering

    def _need(self, index: int) -> None:
        """A group computes now: waits for the group, and sends for the groups that follow in this pass."""
        current = self._pass or GatherPass([], self.groups, self._ahead)
        try:
            skipped = current.turn_of(index) if current.is_to_come(index) else []
            if self._reuses is not None and current.must_gather_again(index):
                self._reuses.check(index, self.groups[index].units[0].layout.slots[0].name, current)
            current.start_gather(index)  # does nothing unless this is the root, or a block whose turn was before
            self._live |= {index, *skipped}
            # Prefetching starts before the wait, so that the next gathers go on beside this group's computing.
            current.send_ahead(index)
            for unit in self.groups[index].units:
                unit.residence.wait()
                if self._saved is not None:
                    self._saved.locate(self._number[id(unit)], unit.residence)
        except CommunicationError:
            self._pass = None  # modules that this error leaves do not gather the rest
            raise
        self._release(skipped)  # after the wait: the skipped ones came before, so releasing them waits for nothing

    def _release(self, indices: Iterable[int]) -> None:
        gives_away = in_backward() if self._is_recorded is None else self._is_recorded
        for i in list(indices):
            for unit in self.groups[i].units:
                unit.residence.release(gives_away=gives_away)
            self._live.discard(i)

    def _end_pass(self, stays: set[int]) -> None:
        """Gathers and releases, one by one, the blocks whose turn has not come: other ranks use these blocks."""
        self._release(self._live - stays)
        if self._pass is not None:
            for i in self._pass.rest():
                self._release([i])
            self._pass = None
        self._is_recorded = None

    # -- forward

    def _before_forward(self, index: int, blocks: frozenset[int]) -> None:
        if self._saved is not None:
            self._saved.enter()
        if in_backward():  # a recomputed forward: part of the backward's pass, and no new use of a block
            self._tasks.see()
            if not self._running:
                self.begin_backward()
            if not self._tasks.is_nested:
                self._reached(current_operation())
        else:
            if not self._running:
                self._tasks.forget()
                self._is_whole = len(blocks) == self._root
                self._is_recording = torch.is_grad_enabled()
                self._pass = GatherPass((i for i in self._order.blocks if i in blocks), self.groups, self._ahead)
            self._running.append(index)
            self._note_use(index)
        if self._root not in self._live:
            self._need(self._root)
        elif self._communicator is not None:  # another stream may be the current one now
            for unit in self.groups[self._root].units:
                unit.residence.join()
        if index != self._root:
            self._need(index)

    def _note_use(self, index: int) -> None:
        if index == self._root:
            return
        if self._is_recording:
            # Without gradients this is the forward of a reentrant checkpoint: the operation that computes the block
            # again in backward is the one that autograd has numbered last.
            self._first_use.setdefault(index, next_operation() - (not torch.is_grad_enabled()))
        self._order.note(index)

    def _after_forward(self, index: int, is_training: bool, outputs: Any) -> None:
        is_recomputed = in_backward()
        if self._saved is not None:
            self._saved.leave()
        if not is_recomputed:
            self._running.pop()
        is_outermost = not is_recomputed and not self._running
        if torch.is_grad_enabled() and (is_outermost or index != self._root):
            # A recomputed forward tells nothing of what comes later in backward.
            made_by = -1 if is_recomputed else next_operation() - 1
            hook = partial(_before_backward, weakref.ref(self), index, made_by)
            for output in tensors_in(outputs):
                # A tensor that a module passes on unchanged was made by the module before, which has its hook there.
                # One that a module changes in place is a new one.
                if output.requires_grad and getattr(output, "_partita_made", None) != output._version:
                    output._partita_made = output._version  # type: ignore[attr-defined]
                    output.register_hook(hook)  # type: ignore[no-untyped-call]
        if is_outermost:
            stays = torch.is_grad_enabled() and (is_training or self._saved is None)
            self._end_pass({self._root} if stays else set())
            # Where all is pinned, ranks may do different things, and some of them nothing.
            if self._is_whole and self._communicator is not None:
                self._order.settle(self._communicator, all(unit.residence.is_pinned for _, unit in self._units))
        elif index != self._root and not is_recomputed and index not in self._running:
            self._release([index])

    # -- backward

    def _before_backward(self, index: int, made_by: int) -> None:
        """The gradient of an output of a group's module is there; no later operation than `made_by` made the output."""
        self._see_backward()
        if not self._running:
            self.begin_backward()
        self._reached(made_by)
        if index != self._root:
            self._release(self._live - {index, self._root, *self._running})
            self._need(index)

    def _reached(self, operation: int) -> None:
        """Autograd is done with all operations after this one: rule 4 of [Note: order of gathers]."""
        if self._communicator is not None and operation >= self._began:
            done = {i for i in self._to_come if self._first_use.get(i, operation + 1) > operation}
            self._to_come -= done
            self._conductor.past([unit for i in done for unit in self.groups[i].units])

    def _see_backward(self) -> None:
        """Called by autograd itself, for which gradients are enabled where the backward is recorded."""
        self._tasks.see()
        self._is_recorded = self._is_recorded or torch.is_grad_enabled()

    def saved_asked(self, number: int) -> None:
        """Autograd is about to use what it saved of a unit."""
        if in_backward():
            self._see_backward()
            index, unit = self._units[number]
            self._asked.add(index)
            if unit.residence.state not in (Residency.HERE, Residency.PINNED):
                self._bring_back(index)
            else:
                unit.residence.join()  # autograd runs an operation on the stream of its forward

    def bring(self, index: int) -> bool:
        """A parameter of a group is used. Returns whether the model computes, so that the parameter is here now."""
        if in_backward():
            self._tasks.see()
            self._asked.add(index)
            self._bring_back(index)
        elif self._running:
            self._note_use(index)
            self._need(index)
        else:
            return False
        return True

    def _bring_back(self, index: int) -> None:
        """An operation of the backward under way uses a group, and perhaps others with it."""
        if not self._running:
            self.begin_backward()
        operation = current_operation()
        if operation != self._operation:
            if not self._tasks.is_nested:  # else the operation is part of a recomputed forward
                self._reached(operation)
            self._release(self._live - self._asked - {index, self._root, *self._running})
            self._operation, self._asked = operation, set()
        self._need(index)

    def backward_over(self) -> None:
        """The backward under way is over, whether it trained or not."""
        self._operation, self._asked = -1, set()
        if self._running:  # a gradient that is part of a forward, whose pass goes on
            self._release(self._live - {self._root, *self._running})
            self._is_recorded = None
        elif not self._conductor.is_training:
            self._end_pass(stays={self._root} if self._saved is None else set())


# The hooks. They are functions over a weak reference: a bound method would keep the lifetimes, and with them the units.


def _before_forward(
    own: weakref.ref[ParameterLifetimes], index: int, blocks: frozenset[int], _module: nn.Module, _inputs: Any
) -> None:
    if (lifetimes := own()) is not None:
        lifetimes._before_forward(index, blocks)


def _after_forward(
    own: weakref.ref[ParameterLifetimes], index: int, module: nn.Module, _inputs: Any, outputs: Any
) -> None:
    if (lifetimes := own()) is not None:
        lifetimes._after_forward(index, module.training, outputs)


def _before_backward(own: weakref.ref[ParameterLifetimes], index: int, made_by: int, _grad: Tensor) -> None:
    if (lifetimes := own()) is not None:
        lifetimes._before_backward(index, made_by)


def _saved_asked(own: weakref.ref[ParameterLifetimes], number: int) -> None:
    if (lifetimes := own()) is not None:
        lifetimes.saved_asked(number)


def _bring(own: weakref.ref[ParameterLifetimes], index: int) -> bool:
    lifetimes = own()
    return lifetimes is not None and lifetimes.bring(index)


def _backward_over(own: weakref.ref[ParameterLifetimes]) -> None:
    if (lifetimes := own()) is not None:
        lifetimes.backward_over()
