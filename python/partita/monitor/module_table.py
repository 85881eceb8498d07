"""Parameters, multiply-accumulates and forward times of a model's modules as text; pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from partita.monitor.comms_log import table_text


@dataclass(frozen=True)
class ModuleCosts:
    """What one module costs, with all that is in it.

    Attributes:
        name: in the model; "" is the model.
        kind: its class.
        parameters: elements; those that several modules share count once.
        flops: of the forwards of one micro-batch.
        seconds: of these forwards; None: not measured.
    """

    name: str
    kind: str
    parameters: int
    flops: float
    seconds: float | None

    @property
    def depth(self) -> int:
        """0: the model."""
        return self.name.count(".") + 1 if self.name else 0


@dataclass(frozen=True)
class ProfiledStep:
    """What is told beside the table.

    Attributes:
        step: in which operations were counted.
        samples: of a micro-batch.
        recompute: the part of the forward that backward computes again.
    """

    step: int
    samples: int
    recompute: float = 0.0


def inclusive(own: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """What each module has with all that is in it, from what each has on its own."""
    return {
        name: sum(value for other, value in own.items() if not name or other == name or other.startswith(f"{name}."))
        for name in names
    }


def summary_text(rows: list[ModuleCosts], step: ProfiledStep, top: int) -> str:
    """The whole, and for each depth the classes that have most. rows: depth first, beginning with the model."""
    whole = rows[0]
    backward = (2 + step.recompute) * whole.flops
    lines = [
        f"FLOPs in step {step.step}, of one micro-batch of {step.samples} samples on rank 0:",
        f"  parameters {scaled(whole.parameters)}",
        f"  forward {scaled(whole.flops / 2)}MACs = {scaled(whole.flops)}FLOPs, "
        f"backward {scaled(backward)}FLOPs (2 x forward"
        + (f" + {step.recompute:g} x forward computed again)" if step.recompute else ")"),
    ]
    if whole.seconds:
        rate = scaled(whole.flops / whole.seconds)
        lines.append(f"  forward {whole.seconds * 1e3:.2f} ms in step {step.step + 1}: {rate}FLOP/s")
    for depth in range(1, max(row.depth for row in rows) + 1):
        here = [row for row in rows if row.depth == depth]
        macs, parameters = Counter[str](), Counter[str]()
        for row in here:
            macs[row.kind] += int(row.flops / 2)
            parameters[row.kind] += row.parameters
        lines.append(
            f"  depth {depth}: most MACs {_most(macs, top)}; most parameters {_most(parameters, top)}",
        )
    return "\n".join(lines)


def tree_text(rows: list[ModuleCosts], depth: int) -> str:
    """All modules down to a depth (-1: all), one line each."""
    whole = rows[0]
    cells = [
        [
            "  " * row.depth + (row.name.rpartition(".")[2] or "model"),
            row.kind,
            scaled(row.parameters).rstrip(),
            _share(row.parameters, whole.parameters),
            scaled(row.flops / 2).rstrip(),
            _share(row.flops, whole.flops),
            "-" if row.seconds is None else f"{row.seconds * 1e3:.3f}",
            "-" if row.seconds is None else _share(row.seconds, whole.seconds or 0.0),
            scaled(row.flops / row.seconds).rstrip() if row.seconds and row.flops else "-",
        ]
        for row in rows
        if depth < 0 or row.depth <= depth
    ]
    head = ["module", "class", "parameters", "share", "MACs", "share", "forward ms", "share", "FLOP/s"]
    return table_text(head, cells)


def scaled(value: float) -> str:
    """1234567 -> "1.235 M"; ends with a space where there is no letter, so that a unit may follow."""
    for letter in ("", "k", "M", "G", "T"):
        if abs(value) < 1000:
            return f"{value:.4g} {letter}"
        value /= 1000
    return f"{value:.4g} P"


def _most(values: Counter[str], top: int) -> str:
    return ", ".join(f"{kind} {scaled(value).rstrip()}" for kind, value in values.most_common(top))


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"
