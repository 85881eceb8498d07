"""The names of the parameters that the optimizer of DeepSpeed's stage 0 only numbers. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from partita.checkpoint.errors import CheckpointError

Shape = tuple[int, ...]
_TRIED = 200_000  # states of the search; one group needs as many as there are parameters


def names_in_order(shapes: dict[str, Shape], groups: Sequence[Sequence[Shape | None]]) -> list[list[str]]:
    """The names of the parameters of each param group.

    Programs go through the parameters of a model and give each to one group, or leave it out because it is frozen. So
    the parameters of a group are in the order of the model; of the ways in which the shapes allow that, there must be
    one.

    Args:
        shapes: by name, of the model's parameters in their order.
        groups: the shapes in each group, in its order; None: any, as nothing is kept for the parameter.

    Raises:
        CheckpointError: there is no such order, or more than one.
    """
    names = list(shapes)
    spare = len(names) - sum(map(len, groups))
    ways = _ways([shapes[name] for name in names], groups, spare) if spare >= 0 else []
    if len(ways) != 1:
        how = "no order of the model's parameters fits" if not ways else "more than one order of parameters fits"
        raise CheckpointError(
            f"DeepSpeed's stage 0 numbers the states of its optimizer and does not name them, and {how}: save once in "
            "stage 1, 2 or 3, or leave the states out with --weights-only"
        )
    return [[name for name, chosen in zip(names, ways[0], strict=True) if chosen == g] for g in range(len(groups))]


def _ways(shapes: list[Shape], groups: Sequence[Sequence[Shape | None]], spare: int) -> list[list[int | None]]:
    """Up to two ways: for each parameter its group, or None."""
    found: list[list[int | None]] = []
    dead: set[tuple[int, ...]] = set()
    # Depth first, without recursion: (places in the groups, what was chosen so far).
    todo: list[tuple[tuple[int, ...], list[int | None]]] = [(tuple(0 for _ in groups), [])]
    tried = 0
    while todo and len(found) < 2 and tried < _TRIED:
        tried += 1
        places, chosen = todo.pop()
        if len(chosen) == len(shapes):
            found.append(chosen)
            continue
        state = (len(chosen), *places)
        if state in dead and not found:
            continue
        dead.add(state)
        if len(chosen) - sum(places) < spare:
            todo.append((places, [*chosen, None]))
        for g in reversed(range(len(groups))):
            if places[g] < len(groups[g]) and groups[g][places[g]] in (None, shapes[len(chosen)]):
                todo.append((tuple(p + (i == g) for i, p in enumerate(places)), [*chosen, g]))
    return found if tried < _TRIED else []
