"""A short table of the results in a folder, targets beside the figures.

python bench/gpu/summary.py bench/results/gpu [--markdown FILE]

Exit status 1 when something in it is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import prelude  # noqa: F401  (the helpers of the peers can be imported after it)
from report import print_table

Result = dict[str, Any]
HEADER = ["what", "measured", "target", "met", "note"]
RIGHT_OR_WRONG = ("passed", "0", "True")  # targets that are not of speed
ADAM_TARGETS = {"adam bf16", "adam bf16 split masters", "adam fp32", "adam fp16"}


@dataclass(frozen=True)
class Row:
    """One figure; `met` None where there is no target, or nothing was measured."""

    what: str
    measured: str
    target: str = ""
    met: bool | None = None
    note: str = ""

    @property
    def is_wrong(self) -> bool:
        """Whether something failed, or was not tried for want of time; a target of speed that is missed is neither."""
        return self.measured == "error" or (self.met is False and self.target in RIGHT_OR_WRONG)

    @property
    def cells(self) -> list[str]:
        return [self.what, self.measured, self.target, {None: "", True: "yes", False: "NO"}[self.met], self.note]


def shortened(text: object) -> str:
    return " ".join(str(text).split())[:110]


def answers_of(result: Result) -> Iterator[tuple[str, list[Result], str]]:
    """(case, its answers that hold figures, the error of the one that does not)."""
    for case, answers in result["cases"].items():
        error = next((shortened(answer["error"]) for answer in answers if "error" in answer), "")
        yield case, [answer for answer in answers if "error" not in answer], error


def of_checks(result: Result) -> Iterator[Row]:
    for name, check in result["checks"].items():
        passed = None if check["outcome"] == "left out" else check["outcome"] == "passed"
        note = check.get("why") or f"{shortened(check.get('summary', ''))}, {check.get('seconds', 0):.0f} s"
        yield Row(name, check["outcome"], "passed", passed, note)


def of_adam(result: Result) -> Iterator[Row]:
    for case, answers in result["cases"].items():
        answer = answers[-1]
        size = f"{int(case.split()[1]):.0e}".replace("e+0", "e")
        for name, figure in answer.get("figures", {}).items():
            note = f"{figure['gb_per_s']:.0f} GB/s; copy {median(answer['copy_gb_per_s']):.0f}"
            target, met = "", None
            if name in ADAM_TARGETS:
                peer = figure.get("of_torch_per_byte")
                target, met = ">= 0.90, >= 1.0x torch", figure["of_copy"] >= 0.9 and (peer is None or peer >= 1.0)
                note += f"; {peer:.2f}x torch fused per byte" if peer else ""
            yield Row(f"{name}, {size}", f"{figure['of_copy']:.2f} of copy", target, met, note)
        for name, error in answer.get("errors", {}).items():
            yield Row(f"{name}, {size}", "error", note=shortened(error))
        if "error" in answer:
            yield Row(case, "error", note=shortened(answer["error"]))


def of_step(result: Result) -> Iterator[Row]:
    for case, answers, error in answers_of(result):
        if answers:
            floor = median(answer["x_floor"] for answer in answers)
            ours = "partita" in case
            note = f"{median(median(answer['ms']) for answer in answers):.2f} ms"
            note += f", {median(answer['bytes_per_parameter'] for answer in answers):.1f} bytes per parameter"
            measured, target = f"{floor:.2f}x floor", "<= 1.15x" if ours else ""
            yield Row(f"step {case}", measured, target, floor <= 1.15 if ours else None, note)
        if error:
            yield Row(f"step {case}", "error", note=error)


def of_host(result: Result) -> Iterator[Row]:
    for case, answers, error in answers_of(result):
        if error:
            yield Row(case, "error", note=error)
        for answer in answers:
            yield _host_row(case, answer)


def _host_row(case: str, answer: Result) -> Row:
    if case.startswith("time"):
        ours = "partita" in case
        met = answer["median_ms"] < 1 if ours else None
        what = f"{case}, {answer['parameters']:,} tensors"
        return Row(what, f"{answer['median_ms']:.2f} ms", "< 1 ms" if ours else "", met)
    if case.startswith("calls"):
        blocking = ", ".join(f"{count} {name}" for name, count in answer["blocking"].items())
        count = sum(answer["blocking"].values())
        met = count == 0 if answer["calls"] else None
        return Row(case, f"{count} blocking", "0", met, blocking or f"of {answer['calls']} CUDA calls")
    found, watched = answer["synchronisations"], answer["watched"]
    note = answer["raised"] or f"{answer['skipped_steps']} of the steps were skipped; {', '.join(answer['where'])}"
    met = found == 0 and answer["raised"] is None
    return Row(case, f"{found} in {answer['steps']} steps", "0", met if watched else None, shortened(note.rstrip("; ")))


def of_gpt2(result: Result) -> Iterator[Row]:
    found = {case: (answers, error) for case, answers, error in answers_of(result)}
    speeds = {case: median(a["tokens_per_s"] for a in answers) for case, (answers, _) in found.items() if answers}
    for case, (answers, error) in found.items():
        if answers:
            last = answers[-1]
            peer = speeds.get(case.replace("partita0-split", "torch-autocast").replace("partita0", "torch-autocast"))
            ours = "partita" in case and peer is not None
            memory = last["peak_bytes"].get("allocated", 0) / 2**30
            note = f"MFU {last['mfu']:.1%}, {memory:.1f} GiB, micro-batch {last['micro_batch']}"
            note += f", {speeds[case] / peer:.2f}x torch" if ours and peer else ""
            met = speeds[case] > peer if ours and peer else None
            yield Row(f"GPT-2 {case}", f"{speeds[case]:,.0f} tokens/s", "> torch" if ours else "", met, note)
        if error:
            yield Row(f"GPT-2 {case}", "error", note=error)


def of_largest(result: Result) -> Iterator[Row]:
    for answer in result["cases"].get("memory", []):
        if "error" in answer:
            yield Row("largest", "error", note=shortened(answer["error"]))
    for masters in ("fp32", "split"):
        if (found := result.get(masters)) is not None:
            of_formula = found.get("of_formula", 0.0)
            note = shortened(found.get("error", f"{of_formula:.1%} of free memory / {found['bytes_per_parameter']}"))
            measured = f"{found['parameters'] / 1e9:.3g}e9 parameters" if found["parameters"] else "none"
            yield Row(f"largest, {masters} masters", measured, ">= 95 % of formula", of_formula >= 0.95, note)


def of_offload(result: Result) -> Iterator[Row]:
    for kind, ratio in result.get("of_resident", {}).items():
        yield Row(f"offload, {kind}", f"{ratio:.2f} x resident")
    for what, met in result.get("beyond_the_device", {}).items():
        yield Row(f"beyond the device's memory: {what.replace('_', ' ')}", str(met), "True", bool(met))
    for case, _, error in answers_of(result):
        if error and not case.startswith("resident within"):
            yield Row(f"offload {case}", "error", note=error)


TABLES: dict[str, Callable[[Result], Iterator[Row]]] = {
    "tests": of_checks,
    "sanitize": of_checks,
    **dict.fromkeys(("cpp", "pytest", "rehearsal", "queue", "memcheck", "racecheck"), of_checks),
    "adam": of_adam,
    "optimizer_step": of_step,
    "host_sync": of_host,
    "host": of_host,
    "gpt2": of_gpt2,
    "gpt2_compiled": of_gpt2,
    "largest": of_largest,
    "offload": of_offload,
}


def rows_of(folder: Path) -> list[Row]:
    """The rows of all results that are there; a file that cannot be read is a row as well."""
    rows: list[Row] = []
    for name, table in TABLES.items():
        path = folder / f"{name}.json"
        if path.exists():
            try:
                rows += table(json.loads(path.read_text()))
            except (ValueError, KeyError, TypeError) as error:
                rows.append(Row(name, "error", note=f"{path.name} cannot be read: {error!r}"))
    return rows


def about(folder: Path) -> str:
    """Which device and versions the results are of."""
    lines = set()
    for name in TABLES:
        path = folder / f"{name}.json"
        if path.exists() and "device" in (result := json.loads(path.read_text())):
            versions = ", ".join(f"{name} {version}" for name, version in result["setting"]["versions"].items())
            lines.add(f"{result['device'].get('name')}, {versions}")
    return "\n".join(sorted(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    rows = rows_of(arguments.folder)
    print(f"\n{about(arguments.folder)}\n")
    if not rows:
        print(f"no results in {arguments.folder}")
        return
    print_table(HEADER, [row.cells for row in rows])
    if arguments.markdown is not None:
        lines = [HEADER, ["---"] * len(HEADER), *(row.cells for row in rows)]
        table = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in lines)
        arguments.markdown.write_text(f"{about(arguments.folder)}\n\n{table}\n")
    sys.exit(any(row.is_wrong for row in rows))


if __name__ == "__main__":
    main()
