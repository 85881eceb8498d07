"""The commands `partita checkpoint ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NoReturn

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
    encrypt,
    event_of,
    export,
    facts_of,
    find,
    latest_tag,
    new_key,
    prune,
    rekey,
    require_folder,
    verify,
)
from partita.checkpoint.user_key import UserKey
from partita.cli.keys import KeyCommand, KeyEnv, KeyFile, key_from, protection_from

app = typer.Typer(help="Look at checkpoints, check them, export weights, import DeepSpeed's.", no_args_is_help=True)

_Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder in which checkpoints were saved.")]
_Tag = Annotated[str | None, typer.Option("--tag", "-t", help="The checkpoint; without it: the latest.")]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "as saved": None}


@app.command()
def inspect(folder: _Folder, key_env: KeyEnv = None, key_file: KeyFile = None, key_command: KeyCommand = None) -> None:
    """Print a line for each checkpoint: tag, step, samples, size, and the run that saved it, if it can be read."""
    try:
        key = key_from(key_env, key_file, key_command)
        found = _all_in(folder)
    except (CheckpointError, OSError) as error:
        _fail(str(error))
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
        facts = ", ".join(f"{name} {value}" for name, value in _facts(one, key).items())
        mark = " (latest)" if one.tag == latest else ""
        cells = (f"{one.tag}{mark}", f"{manifest.step:,}", f"{manifest.samples:,}", _size(one), manifest.created)
        table.add_row(*(Text(cell) for cell in (*cells, str(manifest.world_size), facts)))
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(table)


@app.command("verify")
def verify_command(
    folder: _Folder, tag: _Tag = None, key_env: KeyEnv = None, key_file: KeyFile = None, key_command: KeyCommand = None
) -> None:
    """Read every byte of a checkpoint and compare it with what was saved; 1 if something is damaged.

    Of an encrypted checkpoint, damage is found without its key, and what people have changed with it.
    """
    found = _find(folder, tag)
    problems = []
    try:
        protection = protection_from(key_env, key_file, key_command)
    except CheckpointError as error:
        _fail(str(error))
    try:
        cipher = None if protection.key is None else protection.opened(found)
    except CheckpointError as error:
        protection.tell(folder, event_of("refused", found))
        _fail(str(error))
    with _progress() as progress:
        task = progress.add_task("", total=sum(record.size for record in found.manifest.files.values()))
        for looked_at in verify(found.path, found.manifest, cipher):
            progress.advance(task, looked_at.nbytes)
            if looked_at.problem:
                problems.append(looked_at.problem)
    protection.tell(folder, event_of("refused" if problems else "verified", found))
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        raise typer.Exit(1)
    unseen = found.manifest.encryption is not None and cipher is None
    note = "; without the key, only damage was looked for" if unseen else ""
    typer.echo(f"'{found.path}' is sound: {len(found.manifest.files)} files, {_size(found)}{note}")


@app.command("export")
def export_command(
    folder: _Folder,
    output: Annotated[Path, typer.Argument(metavar="PATH", help="A .safetensors file, or a folder of them.")],
    tag: _Tag = None,
    dtype: Annotated[str, typer.Option(help=f"Of the weights: {', '.join(_DTYPES)}.")] = "fp32",
    key_env: KeyEnv = None,
    key_file: KeyFile = None,
    key_command: KeyCommand = None,
) -> None:
    """Write the weights of a checkpoint into safetensors files; fp32 writes the masters."""
    if dtype not in _DTYPES:
        _fail(f"--dtype {dtype}: give one of {', '.join(_DTYPES)}")
    found = _find(folder, tag)
    try:
        protection = protection_from(key_env, key_file, key_command)
        nbytes = sum(export(found, output, _DTYPES[dtype], protection))
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
    key_env: KeyEnv = None,
    key_file: KeyFile = None,
    key_command: KeyCommand = None,
) -> None:
    """Make a checkpoint that engine.load_checkpoint() loads out of one that DeepSpeed saved; with a key, encrypt it."""
    try:
        protection = protection_from(key_env, key_file, key_command)
        one = DeepSpeedImport(
            source, folder, tag, as_tag, weights_only=weights_only, any_objects=any_objects, protection=protection
        )
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
    folder: _Folder,
    keep: Annotated[int, typer.Option(min=1, help="How many of the newest checkpoints stay.")],
    key_env: KeyEnv = None,
    key_file: KeyFile = None,
    key_command: KeyCommand = None,
) -> None:
    """Delete all but the newest checkpoints; the latest and what cannot be read stay. With a key, the log says it."""
    try:
        protection = protection_from(key_env, key_file, key_command)
        _all_in(folder)
        for found in prune(folder, keep):
            protection.tell(folder, event_of("pruned", found))
            typer.echo(f"deleted '{found.path}'")
    except (CheckpointError, OSError) as error:
        _fail(str(error))


@app.command("new-key")
def new_key_command() -> None:
    """Print a new random key, for a file of your own (chmod 600) or a store of secrets."""
    typer.echo(new_key())


@app.command("encrypt")
def encrypt_command(
    folder: _Folder,
    tag: Annotated[str | None, typer.Option("--tag", "-t", help="One checkpoint; without it: all plain ones.")] = None,
    key_env: KeyEnv = None,
    key_file: KeyFile = None,
    key_command: KeyCommand = None,
) -> None:
    """Encrypt checkpoints that are not. Each is there as it was until it is encrypted."""
    try:
        key = key_from(key_env, key_file, key_command)
        if key is None:
            _fail("give the key: --key-env, --key-file or --key-command")
        found = [find(folder, tag)] if tag else [one for one in _all_in(folder) if one.manifest.encryption is None]
        if not found:
            _fail(f"'{folder}': all checkpoints are encrypted already")
        for one in found:
            with _progress() as progress:
                task = progress.add_task("", total=sum(record.size for record in one.manifest.files.values()))
                for nbytes in encrypt(one, key):
                    progress.advance(task, nbytes)
            typer.echo(f"'{one.path}' is encrypted")
    except (CheckpointError, OSError) as error:
        _fail(str(error))


@app.command("rekey")
def rekey_command(
    folder: _Folder,
    tag: Annotated[str | None, typer.Option("--tag", "-t", help="One checkpoint; without it: all and the log.")] = None,
    key_env: KeyEnv = None,
    key_file: KeyFile = None,
    key_command: KeyCommand = None,
    new_key_env: KeyEnv = None,
    new_key_file: KeyFile = None,
    new_key_command: KeyCommand = None,
) -> None:
    """Give encrypted checkpoints another key; the old one does not open them any more. No data is written anew."""
    try:
        old = key_from(key_env, key_file, key_command)
        new = key_from(new_key_env, new_key_file, new_key_command, "--new-key")
        if old is None or new is None:
            _fail("give the old key (--key-env, --key-file, --key-command) and the new one (--new-key-env, ...)")
        found = _all_in(folder) if tag is None else [find(folder, tag)]
        path = None
        for path in rekey(folder, found, old, new, log=tag is None):
            typer.echo(f"'{path}' has the new key")
        if path is None:
            typer.echo(f"'{folder}': all had the new key already")
    except (CheckpointError, OSError) as error:
        _fail(str(error))


def _facts(one: Found, key: UserKey | None) -> dict[str, Any]:
    """About the run that saved a checkpoint, as far as the key shows them."""
    if one.manifest.encryption is None:
        return one.manifest.engine
    if key is None:
        return {"encrypted": ""}
    try:
        return facts_of(one, key)
    except CheckpointError:
        return {"encrypted": "with another key, or changed"}


def _all_in(folder: Path) -> list[Found]:
    """The checkpoints of a folder, of which there is one at least."""
    require_folder(folder)
    found = checkpoints(folder)
    if not found:
        raise CheckpointError(f"'{folder}': there is no whole checkpoint")
    return found


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
