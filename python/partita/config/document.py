"""docs/config.md and docs/config.schema.json, generated from the models.

python -m partita.config.document docs
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pydantic.fields import FieldInfo

from partita.config.allowed import allowed_values
from partita.config.fields import DeepSpeedDefault, OwnKey, Section
from partita.config.models import Config
from partita.config.sections import all_sections, subsections
from partita.files import file_to_write

MARKDOWN_NAME = "config.md"
SCHEMA_NAME = "config.schema.json"

_INTRODUCTION = """\
# Configuration

<!-- Generated from python/partita/config; edit the models, then: python -m partita.config.document docs -->

A JSON object, given to `partita.initialize()` as a dict or as the path of a file. Every key is optional unless its
default says "required". Keys have DeepSpeed's names and meaning where DeepSpeed has the key; the last column says
where DeepSpeed 0.19 has another default, and which keys are Partita's own. An unknown key, a value of another type or
out of range, and a key written twice are errors. [config.schema.json](config.schema.json) lets an editor check the
file.

`train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x number of ranks`: give any of the
three and the rest follows; where a choice remains, accumulation is 1, then the micro-batch is 1.
"""


def config_markdown() -> str:
    """One table per section: key, allowed values, default, meaning, relation to DeepSpeed's key."""
    return "\n".join([_INTRODUCTION, *(_section(path, model) for path, model in all_sections())])


def config_json_schema() -> str:
    """The JSON Schema of the config file."""
    return json.dumps(Config.model_json_schema(), indent=2) + "\n"


def write_documents(folder: Path) -> None:
    """Write both documents into an existing folder."""
    file_to_write(folder / MARKDOWN_NAME).write_text(config_markdown(), encoding="utf-8")
    file_to_write(folder / SCHEMA_NAME).write_text(config_json_schema(), encoding="utf-8")


def _section(path: str, model: type[Section]) -> str:
    allowed, nested = allowed_values(model), subsections(model)
    lines = [
        f"## {path or 'Top level'}",
        "",
        (model.__doc__ or "").strip(),
        "",
        "| key | value | default | meaning | in DeepSpeed |",
        "|---|---|---|---|---|",
    ]
    for key, field in model.model_fields.items():
        default = "see there" if key in nested and field.default is not None else _default(field)
        lines.append(f"| `{key}` | {allowed[key]} | {default} | {field.description} | {_in_deepspeed(field)} |")
    return "\n".join(lines) + "\n"


def _default(field: FieldInfo) -> str:
    return "required" if field.is_required() else f"`{json.dumps(field.default)}`"


def _in_deepspeed(field: FieldInfo) -> str:
    if any(isinstance(note, OwnKey) for note in field.metadata):
        return "no such key"
    return next((f"default {note.text}" for note in field.metadata if isinstance(note, DeepSpeedDefault)), "same")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m partita.config.document FOLDER")
    write_documents(Path(sys.argv[1]))
