"""Whole parameters for a while."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

import torch
from torch import nn

from partita.comm import by_rank
from partita.units import Holder, holder_of


class GatheredParameters:
    """Inside the block, these parameters have all their values on every rank, in every ZeRO stage.

    All ranks enter and leave together. Ranks may do different things inside, such as generating texts of different
    lengths with a model that is gathered as a whole. All parameters that share a unit with one of `parameters` are
    gathered with it, so one block for many parameters costs less than many blocks.

    Writing needs a `modifier_rank`: when the block ends, the parameters take that rank's values on all ranks, and what
    others wrote is dropped.

    Arguments have DeepSpeed's names and order.

    Args:
        params: one, or several; those that no engine and no `Init` has taken are left as they are.
        modifier_rank: the rank whose values count; None: they are only read.
        fwd_module: a module that uses the parameters in its forward. It must have them, itself or in its children: then
            they are there when it computes.
        enabled: false does nothing.

    Raises:
        ValueError: there is no such `modifier_rank`, or `fwd_module` lacks one of the parameters; names it.
        RuntimeError: when the block ends, on all ranks: a parameter was written to on some rank, and `modifier_rank` is
            None or the parameter is not in `params`. What was written to partitioned parameters is dropped.
    """

    def __init__(
        self,
        params: nn.Parameter | Iterable[nn.Parameter],
        modifier_rank: int | None = None,
        fwd_module: nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        given = [params] if isinstance(params, nn.Parameter) else list(params)
        self._modifier_rank = modifier_rank
        self._given: dict[Holder, list[nn.Parameter]] = {}
        for parameter in given if enabled else []:
            holder = holder_of(parameter)
            if holder is not None and not any(parameter is p for p in self._given.setdefault(holder, [])):
                self._given[holder].append(parameter)
        for holder in self._given:
            if modifier_rank is not None and not 0 <= modifier_rank < holder.communicator.world_size:
                raise ValueError(
                    f"modifier_rank = {modifier_rank}: there are the ranks 0 to {holder.communicator.world_size - 1}"
                )
        if fwd_module is not None:
            self._require_in(fwd_module)
        self._versions: list[tuple[Holder, nn.Parameter, int]] = []

    def __enter__(self) -> None:
        pinned: list[Holder] = []
        try:
            with self._call_of_all():
                for holder in self._given:
                    holder.pin()
                    pinned.append(holder)
        except BaseException:
            for holder in pinned:
                holder.unpin()
            raise
        self._versions = [(holder, p, p._version) for holder in self._given for p in holder.parameters]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                with self._call_of_all():
                    self._refuse_unclaimed()
                    if self._modifier_rank is not None:
                        self._commit(self._modifier_rank)
        finally:
            for holder in self._given:
                holder.unpin()

    def _call_of_all(self) -> AbstractContextManager[None]:
        """The beginning or the end of the block, where all ranks communicate."""
        holder = next(iter(self._given), None)
        return nullcontext() if holder is None else holder.communicator.call_of_all("GatheredParameters()")

    def _require_in(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"fwd_module is a {type(module).__name__}: it is the module that uses the parameters")
        own = set(map(id, module.parameters()))
        for holder, given in self._given.items():
            for parameter in given:
                if id(parameter) not in own:
                    raise ValueError(
                        f"parameter '{holder.name_of(parameter)}' is not in fwd_module ({type(module).__name__}), so "
                        "it will not be there in that module's forward: make it an attribute of that module too, "
                        "before initialize(); shared parameters stay shared"
                    )

    def _refuse_unclaimed(self) -> None:
        """A collective: whoever wrote, all ranks raise."""
        claimed = {id(p) for given in self._given.values() for p in given if self._modifier_rank is not None}
        written = next((h.name_of(p) for h, p, v in self._versions if p._version != v and id(p) not in claimed), None)
        for communicator in {holder.communicator: None for holder in self._given}:
            writers = [rank for rank, wrote in enumerate(by_rank(communicator, written is not None)) if wrote]
            if writers:
                what = "a parameter" if written is None else f"parameter '{written}'"
                raise RuntimeError(
                    f"{what} was written to inside GatheredParameters on rank {', '.join(map(str, writers))}, and "
                    "would differ between ranks: give GatheredParameters that parameter, and modifier_rank= the rank "
                    "whose values all shall have"
                )

    @torch.no_grad()
    def _commit(self, rank: int) -> None:
        for holder, given in self._given.items():
            for parameter in given:
                data = parameter.data
                values = data.contiguous()  # Init leaves strides as a model has chosen them
                holder.communicator.broadcast(values, rank).wait()
                if values is not data:
                    data.copy_(values)
            holder.commit(given)
