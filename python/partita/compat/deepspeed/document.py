"""docs/deepspeed.md, generated from the rows.

python -m partita.compat.deepspeed.document docs
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from partita.compat.deepspeed._surface import SECTIONS, Row, all_rows
from partita.files import file_to_write

MARKDOWN_NAME = "deepspeed.md"

_INTRODUCTION = """\
# DeepSpeed's names

<!-- Generated from python/partita/compat/deepspeed/_surface: python -m partita.compat.deepspeed.document docs -->

`partita.compat.deepspeed` has the public modules of DeepSpeed for everything that Partita has, each in terms of
Partita's own calls. A program says `import partita.compat.deepspeed as deepspeed`; or `partita run script.py` makes
`import deepspeed` mean it in a program that is not changed at all.

This page has an answer to every public call, class and attribute in DeepSpeed's API pages and tutorials. It **works**:
it does what DeepSpeed's documentation says. It **differs**: it is there, and the difference is said. It is **absent**:
using it is an AttributeError, and importing it an ImportError, with the words that stand here. Keys of the config have
their answers in [Configuration](config.md#the-three-answers).
"""


def surface_markdown() -> str:
    """The rows, section by section, with how many there are of each answer."""
    counts = Counter(row.answer.value for row in all_rows())
    summary = ", ".join(f"{count} {answer}" for answer, count in counts.items())
    return "\n".join([_INTRODUCTION, f"{len(all_rows())} names: {summary}.", "", *map(_section, SECTIONS)])


def _section(title: str) -> str:
    lines = [f"## {title}", "", "| name | answer | how, or what instead |", "|---|---|---|"]
    return "\n".join([*lines, *map(_line, SECTIONS[title])]) + "\n"


def _line(row: Row) -> str:
    return f"| `{row.name}` | {row.answer.value} | {row.how} |"


def write_document(folder: Path) -> None:
    """Writes the page into an existing folder."""
    file_to_write(folder / MARKDOWN_NAME).write_text(surface_markdown(), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m partita.compat.deepspeed.document FOLDER")
    write_document(Path(sys.argv[1]))
