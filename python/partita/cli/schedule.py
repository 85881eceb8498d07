"""The command `partita schedule`."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from partita.files import file_to_write
from partita.pipeline import (
    NAMES,
    Costs,
    Schedule,
    ScheduleError,
    Simulation,
    auto,
    by_name,
    draw,
    from_text,
    prove,
    simulate,
    timeline,
    to_csv,
    to_text,
)

_WIDTH = 120  # of what is written into a file or a pipe


def schedule(
    name: Annotated[
        str, typer.Option("--schedule", help=f"{', '.join(NAMES)}, auto, or a file (ours, or torch's CSV).")
    ] = "1f1b",
    stages: Annotated[
        int | None, typer.Option(help="Pipeline stages, which is ranks: as DeepSpeed's num_stages.")
    ] = None,
    micro_batches: Annotated[int | None, typer.Option(help="In one step: gradient_accumulation_steps.")] = None,
    chunks: Annotated[int | None, typer.Option(help="Pieces of the model per rank, for interleaved schedules.")] = None,
    times: Annotated[
        str, typer.Option(help="Time of a forward, of the input gradients and of the weight gradients, of every piece.")
    ] = "1,1,1",
    costs: Annotated[
        Path | None, typer.Option(help="JSON with the fields of partita.pipeline.Costs: times and bytes of each piece.")
    ] = None,
    memory: Annotated[float | None, typer.Option(help="For auto: bytes of each rank.")] = None,
    output: Annotated[
        list[Path] | None, typer.Option("--output", "-o", help="Also write: .txt, .csv (torch's), .svg, .png or .pdf.")
    ] = None,
) -> None:
    """Prove, time and draw a pipeline schedule; 1 if it cannot run."""
    try:
        made, its_costs = _made(name, stages, micro_batches, chunks, times, costs, memory)
        run = simulate(made, its_costs)
        _print(made, run, its_costs)
        for path in output or []:
            _write(made, run, path, f"{name}: {run.bubble:.1%} idle")
    except (ScheduleError, ValueError, OSError, ImportError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


def _made(
    name: str,
    stages: int | None,
    micro_batches: int | None,
    chunks: int | None,
    times: str,
    costs: Path | None,
    memory: float | None,
) -> tuple[Schedule, Costs]:
    path = Path(name)
    if name not in (*NAMES, "auto") and (path.suffix or path.exists()):
        made = from_text(path.read_text(encoding="utf-8"))
        return made, _costs(made.num_stages, times, costs)
    if stages is None or micro_batches is None:
        raise ScheduleError("give --stages and --micro-batches, or a file as --schedule")
    if name == "auto":
        its_costs = _costs(stages * (chunks or 1), times, costs)
        if memory is None:
            raise ScheduleError("give --memory for auto: the bytes of each rank")
        return auto(stages, micro_batches, its_costs, [memory] * stages), its_costs
    made = by_name(name, stages, micro_batches, chunks)
    return made, _costs(made.num_stages, times, costs)


def _costs(num_stages: int, times: str, path: Path | None) -> Costs:
    if path is None:
        words = times.split(",")
        try:
            forward, inputs, weights = map(float, words)
        except ValueError:
            raise ScheduleError(f"--times {times}: give three numbers, as in 1,1,1") from None
        return Costs.equal(num_stages, forward, inputs, weights)
    text = path.read_text(encoding="utf-8")
    try:
        costs = TypeAdapter(Costs).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ScheduleError(f"'{path}' has no costs: {where + ': ' if where else ''}{first['msg']}") from None
    known = [field.name for field in fields(Costs)]
    unknown = sorted(json.loads(text).keys() - set(known))
    if unknown:
        raise ScheduleError(f"'{path}' has '{unknown[0]}', which is none of {', '.join(known)}")
    return costs


def _print(made: Schedule, run: Simulation, costs: Costs) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH
    proof = prove(made)
    table = Table()
    for column in ("rank", "stages", "idle", "activations", "waiting W", "received", "bytes"):
        table.add_column(column, justify="right")
    for rank in range(made.num_ranks):
        counts = (proof.activations[rank], proof.waiting_weights[rank], proof.received[rank])
        idle = f"{run.idle[rank] / run.compute_time:.1%}" if run.compute_time else ""
        own = ", ".join(map(str, made.stages_of(rank)))
        table.add_row(str(rank), own, idle, *map(str, counts), f"{run.peak_bytes[rank]:,}")
    console.print(table)
    typer.echo(timeline(run, console.width))
    if made.num_stages > made.num_ranks:
        typer.echo("(small letters: further stages of a rank)")
    sends = "no deadlock, with rendezvous sends and one queue for each pair of ranks"
    typer.echo(f"proved: {len(proof.order):,} actions, each once; {sends}")
    typer.echo(f"time {run.time:g}, bubble {run.bubble:.1%}")
    shares = run.stage_shares()
    if len(set(costs.forward)) > 1 and shares:
        stage = max(shares, key=lambda one: shares[one])
        typer.echo(f"critical path: {shares[stage]:.0%} of it is stage {stage}, which is the one to shrink")


def _write(made: Schedule, run: Simulation, path: Path, title: str) -> None:
    if path.suffix in (".txt", ".csv"):
        file_to_write(path).write_text(to_text(made) if path.suffix == ".txt" else to_csv(made), encoding="utf-8")
    else:
        draw(run, path, title)
