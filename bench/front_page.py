"""The picture of README.md, and its ratios, from bench/results.

    python bench/front_page.py                                     docs/images/front.svg
    python bench/front_page.py --runs one=DIR stage0=DIR ...       the losses anew, from runs of examples/pretrain_lm.py

The runs were those of LOSS_COMMAND; "one" is one process with the batch of both ranks.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PICTURE = ROOT / "docs" / "images" / "front.svg"
LOSS_COMMAND = (
    "torchrun --nproc-per-node 2 examples/pretrain_lm.py --stage N --steps 300 --width 64 --layers 2 --heads 2 "
    "--context 64 --batch-size 8 --log-every 5 --megabytes 2"
)
LOSS_LINES = {
    "one": ("one process", 5.0, "#c7d0d9"),
    "stage0": ("2 ranks, stage 0", 2.4, "#3b82c4"),
    "stage3": ("2 ranks, stage 3", 1.2, "#d9480f"),
}
ENGINES = {
    "ddp": "DDP",
    "fsdp2": "FSDP2",
    "deepspeed3": "DeepSpeed 3",
    "partita0": "Partita 0",
    "partita3": "Partita 3",
}


def result(name: str) -> dict[str, Any]:
    """bench/results/NAME.json."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def ratio(times: Mapping[str, Sequence[float]], engine: str, base: str) -> float:
    """The median over rounds of the engine's time over the base's in the same round."""
    return median(value / other for value, other in zip(times[engine], times[base], strict=True))


def front_ratios() -> dict[str, float]:
    """The figures of README's first table."""
    stage3, step = result("stage3_bf16")["ms"], result("optimizer_step_bf16")["ms"]
    memory = result("model_states_2")
    trained = memory["peak_mib"]["trained"] - memory["computing_mib"]
    return {
        "stage 3 / DeepSpeed": ratio(stage3, "partita3", "deepspeed3"),
        "stage 3 / FSDP2": ratio(stage3, "partita3", "fsdp2"),
        "optimizer step / DeepSpeed": ratio(step, "partita2", "deepspeed2"),
        "memory / formula": trained / memory["formula_mib"],
    }


def take_losses(runs: Mapping[str, Path]) -> None:
    """Writes bench/results/front_losses.json from the metrics.csv of each run."""
    losses = {}
    for name, folder in runs.items():
        with (folder / "metrics.csv").open(newline="") as stream:
            losses[name] = [
                [int(row["step"]), round(float(row["loss"]), 5)] for row in csv.DictReader(stream) if row["loss"]
            ]
    content = {"command": LOSS_COMMAND, "losses": losses}
    (RESULTS / "front_losses.json").write_text(json.dumps(content) + "\n")


def draw(path: Path) -> None:
    """Left the losses, right the step times."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    FigureCanvasSVG(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
    for name, points in result("front_losses")["losses"].items():
        label, width, color = LOSS_LINES[name]
        left.plot(*zip(*points, strict=True), label=label, linewidth=width, color=color)
    left.set(title="The same loss in every stage", xlabel="step", ylabel="loss, nats per byte")
    left.legend(frameon=False)
    for offset, dtype, color in ((0.2, "fp32", "#9fb3c8"), (-0.2, "bf16", "#3b82c4")):
        times = result(f"stage3_{dtype}")["ms"]
        heights = [ratio(times, engine, "alone") for engine in ENGINES]
        places = [len(ENGINES) - 1 - index + offset for index in range(len(ENGINES))]
        bars = right.barh(places, heights, height=0.38, color=color, label=dtype)
        right.bar_label(
            bars,
            [f"{height:.2f}" for height in heights],
            padding=3,
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    right.axvline(1, color="#52606d", linewidth=0.8, linestyle="--", zorder=0)
    right.set_yticks(range(len(ENGINES)), list(ENGINES.values())[::-1])
    right.set(
        title="Step of a GPT, 33.7 M parameters, 2 CPU ranks",
        xlabel="time, over that of two processes that do not communicate",
    )
    right.set_xlim(0, 3)
    right.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    with rc_context({"svg.hashsalt": "partita"}):  # the same file each time
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws the picture of README.md.")
    parser.add_argument("--runs", nargs="*", default=[], metavar="NAME=DIR", help="take losses from these runs")
    runs = dict(part.split("=", 1) for part in parser.parse_args().runs)
    if runs:
        take_losses({name: Path(folder) for name, folder in runs.items()})
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    draw(PICTURE)
    for name, value in front_ratios().items():
        print(f"{name}: {value:.2f}")


if __name__ == "__main__":
    main()
