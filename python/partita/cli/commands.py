"""The commands as a typer application."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from partita.cli import audit, checkpoints, plot, program, schedule
from partita.config import Answer, ConfigError, Finding, answers_to, clean_form, load_config
from partita.files import file_to_write
from partita.optim import require_buildable

app = typer.Typer(help="Tools for Partita.", no_args_is_help=True, add_completion=False)
config = typer.Typer(help="Look at config files.", no_args_is_help=True)
app.add_typer(config, name="config")
app.add_typer(checkpoints.app, name="checkpoint")
app.add_typer(audit.app, name="audit")
app.command("schedule")(schedule.schedule)
app.command("plot")(plot.plot)

_COLOURS = {Answer.WORKS: "green", Answer.NOTED: "yellow", Answer.REFUSED: "red"}
_PLAIN_WIDTH = 160  # of what is written into a file or a pipe
_File = Annotated[str, typer.Argument(metavar="FILE", help="JSON (with comments if need be), YAML, or base64 of JSON.")]


@app.callback()
def partita() -> None:
    """Tools for Partita."""


@app.command("run", add_help_option=False, context_settings={"ignore_unknown_options": True})
def run(arguments: Annotated[list[str], typer.Argument(metavar="SCRIPT [ARGS]...")]) -> None:
    """Run a Python program with `import deepspeed` meaning Partita; `-m MODULE` in place of SCRIPT runs a module."""
    program.run(arguments)


@config.command()
def check(file: _File) -> None:
    """Print each key with its value, the answer to it (works, noted, refused) and the reason; 1 if one is refused."""
    console = Console()
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    findings = _or_exit(file)
    console.print(_table(findings))
    counts = Counter(finding.answer for finding in findings)
    console.print(", ".join(f"{counts[answer]} {answer.value}" for answer in Answer), highlight=False)
    if counts[Answer.REFUSED]:
        raise typer.Exit(1)


@config.command()
def convert(
    file: _File,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write; without it: to the output.")
    ] = None,
) -> None:
    """Write the clean form as JSON: other spellings replaced, keys without an effect and every "auto" left out."""
    try:
        clean, left_out = clean_form(file), load_config(file).ignored
    except ConfigError as error:
        _fail(str(error))
    for note in left_out:
        typer.echo(f"noted: {note}", err=True)
    text = json.dumps(clean, indent=2)
    if output is None:
        typer.echo(text)
        return
    try:
        file_to_write(output).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        _fail(f"{output}: cannot be written: {error.strerror or error}")


def _or_exit(file: str) -> list[Finding]:
    try:
        findings = answers_to(file)
    except ConfigError as error:
        _fail(str(error))
    if not any(finding.answer is Answer.REFUSED for finding in findings):
        try:
            require_buildable(load_config(file))
        except ConfigError as error:
            findings.append(Finding("", None, Answer.REFUSED, str(error), has_value=False))
    return findings


def _table(findings: list[Finding]) -> Table:
    table = Table()
    table.add_column("key", no_wrap=True)
    table.add_column("value", overflow="fold", max_width=40)
    table.add_column("answer", no_wrap=True)
    table.add_column("reason", overflow="fold")
    for finding in findings:
        value = json.dumps(finding.value, default=str) if finding.has_value else ""
        answer = Text(finding.answer.value, style=_COLOURS[finding.answer])
        table.add_row(Text(finding.key), Text(value), answer, Text(finding.reason))
    return table


def _fail(message: str) -> None:
    typer.echo(message, err=True)
    raise typer.Exit(1)
