"""The commands `partita checkpoint ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from partita.checkpoint import (
    CheckpointError,
    DeepSpeedImport,
    Found,
    checkpoints,
    export,
    find,
    latest_tag,
    prune,
    verify,
)

app = typer.Typer(help="Look at checkpoints, check them, export weights, import DeepSpeed's.", no_args_is_help=True)

_Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder in which checkpoints were saved.")]
_Tag = Annotated[str | None, typer.Option("--tag", "-t", help="The checkpoint; without it: the latest.")]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "as saved": None}


@app.command()
def inspect(folder: _Folder) -> None:
    """Print a line for each checkpoint: tag, step, samples, size, and the run that saved it."""
    try:
        found = checkpoints(folder)
    except OSError as error:
        _fail(str(error))
    if not found:
        _fail(f"'{folder}': there is no whole checkpoint")
    try:
        latest = latest_tag(folder)
    except (CheckpointError, OSError):
        latest = None
    table = Table()
    for column in ("tag", "step", "samples", "size", "created", "ranks", "run"):
        table.add_column(
            column, no_wrap=column != "run", justify="right" if column in ("step", "samples", "size") else "left"
        )
    for one in found:
        manifest = one.manifest
        facts = ", ".join(f"{name} {value}" for name, value in manifest.engine.items())
        mark = " (latest)" if one.tag == latest else ""
        cells = (f"{one.tag}{mark}", f"{manifest.step:,}", f"{manifest.samples:,}", _size(one), manifest.created)
        table.add_row(*(Text(cell) for cell in (*cells, str(manifest.world_size), facts)))
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(table)


@app.command("verify")
def verify_command(folder: _Folder, tag: _Tag = None) -> None:
    """Read every byte of a checkpoint and compare it with what was saved; 1 if something is damaged."""
    found = _find(folder, tag)
    problems = []
    with _progress() as progress:
        task = progress.add_task("", total=sum(record.size for record in found.manifest.files.values()))
        for looked_at in verify(found.path, found.manifest):
            progress.advance(task, looked_at.nbytes)
            if looked_at.problem:
                problems.append(looked_at.problem)
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        raise typer.Exit(1)
    typer.echo(f"'{found.path}' is sound: {len(found.manifest.files)} files, {_size(found)}")


@app.command("export")
def export_command(
    folder: _Folder,
    output: Annotated[Path, typer.Argument(metavar="FILE", help="A new .safetensors file.")],
    tag: _Tag = None,
    dtype: Annotated[str, typer.Option(help=f"Of the weights: {', '.join(_DTYPES)}.")] = "fp32",
) -> None:
    """Write the weights of a checkpoint into one safetensors file; fp32 writes the masters."""
    if dtype not in _DTYPES:
        _fail(f"--dtype {dtype}: give one of {', '.join(_DTYPES)}")
    found = _find(folder, tag)
    try:
        nbytes = sum(export(found, output, _DTYPES[dtype]))
    except (CheckpointError, OSError, ValueError) as error:
        _fail(str(error))
    typer.echo(f"'{output}': {nbytes:,} bytes of weights, of step {found.manifest.step}")


@app.command("import")
def import_command(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="The folder in which DeepSpeed saved checkpoints.")],
    folder: Annotated[Path, typer.Argument(metavar="DEST", help="Another folder, for the new checkpoint.")],
    tag: Annotated[str | None, typer.Option("--tag", "-t", help="DeepSpeed's; without it: the latest.")] = None,
    as_tag: Annotated[str | None, typer.Option(help="Of the new checkpoint; without it: DeepSpeed's.")] = None,
    weights_only: Annotated[bool, typer.Option(help="Leave out what the optimizer keeps.")] = False,
    any_objects: Annotated[bool, typer.Option(help="Leave out objects of unknown classes. None is ever made.")] = False,
) -> None:
    """Make a checkpoint that engine.load_checkpoint() loads out of one that DeepSpeed saved."""
    try:
        one = DeepSpeedImport(source, folder, tag, as_tag, weights_only=weights_only, any_objects=any_objects)
        with _progress() as progress:
            task = progress.add_task("", total=one.nbytes)
            for nbytes in one.run():
                progress.advance(task, nbytes)
        found = find(folder, one.path.name)
    except (CheckpointError, OSError, ValueError) as error:
        _fail(f"'{source}' was not imported: {error}")
    for note in one.notes:
        typer.echo(f"noted: {note}", err=True)
    typer.echo(f"'{one.path}': step {found.manifest.step:,}, {_size(found)}")


@app.command("prune")
def prune_command(
    folder: _Folder, keep: Annotated[int, typer.Option(min=1, help="How many of the newest checkpoints stay.")]
) -> None:
    """Delete all but the newest checkpoints; the latest and what cannot be read stay."""
    try:
        if not checkpoints(folder):
            _fail(f"'{folder}': there is no whole checkpoint")
        for path in prune(folder, keep):
            typer.echo(f"deleted '{path}'")
    except (CheckpointError, OSError) as error:
        _fail(str(error))


def _find(folder: Path, tag: str | None) -> Found:
    try:
        return find(folder, tag)
    except (CheckpointError, OSError) as error:
        _fail(str(error))


def _size(found: Found) -> str:
    size = float(sum(record.size for record in found.manifest.files.values()))
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


def _progress() -> Progress:
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _fail(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(1)
