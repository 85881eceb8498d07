"""Tied weights: parameters that several stages have. Their gradients are summed, so that all copies stay equal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from partita.comm import Communicator, Handle, text_by_rank
from partita.model import ModelPart
from partita.pipeline.shared import Tie
from partita.units import GradState, Slot, Unit


class TiedWeights:
    """The parameters that stages of this rank share with other stages.

    Every stage has a copy, with masters and moments of its own. All copies begin with the same values, and each update
    gets the sum of the gradients of all stages, which every rank forms in the order of the stages: so they stay equal,
    bit for bit.

    Args:
        ties: of the model, the same list on all ranks.
        stage_ranks: the rank of each stage.
        parts: of this rank, by stage.
        pipe: the ranks of the pipeline.
    """

    def __init__(
        self, ties: Sequence[Tie], stage_ranks: Sequence[int], parts: Mapping[int, ModelPart], pipe: Communicator
    ) -> None:
        self._stage_ranks = stage_ranks
        self._pipe = pipe
        self._all_rows = [row for tie in ties for row in _rows(tie)]
        self._rows = [row for row in self._all_rows if any(stage in parts for stage in row)]
        self._places = {
            stage: {s.name: (unit, s) for unit in part.units for s in unit.layout.slots}
            for stage, part in parts.items()
        }
        self.stages = {stage for row in self._rows for stage in row if stage in parts}

    def require_same_groups(self) -> None:
        """The copies of a parameter are in the same param group. A collective of the pipeline.

        Raises:
            ValueError: they are not, and would not stay equal; names them.
        """
        own = {
            f"{stage}:{name}": slot.group
            for stage, places in self._places.items()
            for name, (_, slot) in places.items()
        }
        groups: dict[str, str] = {}
        for text in text_by_rank(self._pipe, ";".join(f"{key}={group}" for key, group in own.items())):
            groups.update(entry.rsplit("=", 1) for entry in text.split(";") if entry)  # type: ignore[misc]
        for row in self._rows:
            found = {name: groups.get(f"{stage}:{name}", "none") for stage, name in row.items()}
            if len(set(found.values())) > 1:
                said = ", ".join(f"'{name}' in group {group}" for name, group in found.items())
                raise ValueError(
                    f"the copies of a tied parameter are in different optimizer groups ({said}), and would not stay "
                    "equal: put them into the same one"
                )

    def trained_here(self) -> list[float]:
        """For each tied parameter of the model two numbers: 1 if a copy on this rank is frozen now, else 0; and 1 if a
        copy on this rank is trained, else 0."""
        numbers = []
        for row in self._all_rows:
            places = [self._places[stage][name] for stage, name in row.items() if name in self._places.get(stage, {})]
            are_frozen = {slot in unit.frozen_slots() for unit, slot in places}
            numbers += [float(True in are_frozen), float(False in are_frozen)]
        return numbers

    def require_all_trained_or_none(self, numbers: Sequence[float]) -> None:
        """Args:
            numbers: the greatest of what the ranks of the pipeline have as `trained_here()`.

        Raises:
            ValueError: some copies of a parameter are frozen and others are not, and would not stay equal; names them.
        """
        for row, is_frozen, is_trained in zip(self._all_rows, numbers[::2], numbers[1::2], strict=True):
            if is_frozen and is_trained:
                said = ", ".join(f"'{name}' in stage {stage}" for stage, name in row.items())
                raise ValueError(
                    f"some copies of a tied parameter are frozen and others are trained ({said}), and would not stay "
                    "equal: call requires_grad_() alike on the ranks of all its stages"
                )

    def sum_gradients(self) -> None:
        """The gradients of all copies become their sum. They have accumulated on their ranks and are not reduced."""
        sends: list[Handle] = []
        for row in self._rows:
            own = {
                stage: gradient for stage, name in row.items() if (gradient := self._gradient(stage, name)) is not None
            }
            if not own:
                continue  # it is not trained
            here = next(iter(own.values()))
            ranks = {self._stage_ranks[stage] for stage in row} - {self._pipe.rank}
            for gradient in own.values():
                sends += [self._pipe.send(gradient, rank) for rank in sorted(ranks)]
            total: Tensor | None = None
            for stage in row:
                given = own.get(stage)
                if given is None:
                    given = torch.empty_like(here)
                    self._pipe.recv(given, self._stage_ranks[stage]).wait()
                total = given.clone() if total is None else total.add_(given)
            for handle in sends:
                handle.wait()
            sends.clear()
            assert total is not None
            for gradient in own.values():
                gradient.copy_(total)

    def _gradient(self, stage: int, name: str) -> Tensor | None:
        """Of a copy on this rank, flat."""
        place: tuple[Unit, Slot] | None = self._places.get(stage, {}).get(name)
        if place is None:
            return None
        unit, slot = place
        assert unit.full_grads is not None and unit.grad_state is GradState.LOCAL
        return unit.full_grads[slot.in_unit]


def share_values(
    ties: Sequence[Tie], stage_ranks: Sequence[int], modules: Mapping[int, nn.Module], pipe: Communicator
) -> None:
    """Every copy of a tied parameter gets the values of the first stage that has it."""
    parameters = {stage: dict(module.named_parameters()) for stage, module in modules.items()}
    for row in (row for tie in ties for row in _rows(tie)):
        (first, name), *others = row.items()
        source = stage_ranks[first]
        ranks = sorted({stage_ranks[stage] for stage, _ in others} - {source})
        with torch.no_grad():
            if source == pipe.rank:
                values = parameters[first][name].detach().contiguous()
                handles = [pipe.send(values, rank) for rank in ranks]
                for handle in handles:
                    handle.wait()
            elif pipe.rank in ranks:
                like = next(parameters[stage][other] for stage, other in others if stage in parameters)
                values = torch.empty_like(like, memory_format=torch.contiguous_format)
                pipe.recv(values, source).wait()
            else:
                continue
            for stage, other in others:
                if stage in parameters:
                    parameters[stage][other].copy_(values)


def _rows(tie: Tie) -> Iterator[dict[int, str]]:
    """For each parameter, its name in each stage, in the order of the stages."""
    for names in zip(*(tie.names[stage] for stage in tie.stages), strict=True):
        yield dict(zip(tie.stages, names, strict=True))
