"""docs/config.md and docs/config.schema.json, generated from the models, the rules and the tables of parameters.

python -m partita.config.document docs
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pydantic.fields import FieldInfo

from partita.config.allowed import allowed_values
from partita.config.answers import Answer, Case
from partita.config.deepspeed_keys import RULES
from partita.config.fields import DeepSpeedDefault, OwnKey, Section
from partita.config.parameters import OPTIMIZERS, REFUSED_OPTIMIZERS, SCHEDULES, Factory
from partita.config.schema import json_schema
from partita.config.sections import all_sections, join, subsections
from partita.files import file_to_write

MARKDOWN_NAME = "config.md"
SCHEMA_NAME = "config.schema.json"

_INTRODUCTION = """\
# Configuration

<!-- Generated from python/partita/config; edit the models and tables, then: python -m partita.config.document docs -->

Given to `partita.initialize()` as a dict, as the path of a file, or as the JSON in base64, as DeepSpeed's launcher
passes it. A file is JSON, which may have comments (`//`, `#`, `/* */`) and a comma before a closing bracket. A file
whose name ends in `.yaml` or `.yml` is YAML (`pip install 'partita[yaml]'`). Every key is optional unless its default
says "required". Keys have DeepSpeed's names and meaning where DeepSpeed has the key; the last column says where
DeepSpeed 0.19 has another default, and which keys are Partita's own. An unknown key, a value of another type or out of
range, and a key written twice are errors. [config.schema.json](config.schema.json) lets an editor check the file.

`partita config check FILE` prints the answer to each key of a file, and `partita config convert FILE` its clean form
(`pip install 'partita[cli]'`).

`"auto"`, which Hugging Face's files have in many places, is the default of a key, but for these: `fp16.enabled` and
`bf16.enabled` follow the parameters of the model; batch sizes follow from each other, the number of ranks and the batch
size of a data loader; `warmup_max_lr` is the learning rate of the optimizer; a `WarmupDecayLR` whose `total_num_steps`
nobody knows keeps the learning rate after its warm-up, with a warning. `engine.config.ignored` says what each became.

`train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x number of ranks`: give any of the
three and the rest follows; where a choice remains, accumulation is 1, then the micro-batch is 1.
"""

_ANSWERS = """\
## The three answers

Every key of DeepSpeed 0.19 has one of three answers, some by value. It **works**: it has the effect that its name says.
It is **noted**: it is accepted, listed in one line at start and in `engine.config.ignored` with the reason, and has no
effect of its own. It is **refused**: the config does not load, and the error says what to do. Keys that begin with `_`,
`#`, `$` or `//` are comments, and noted.
"""


def config_markdown() -> str:
    """The keys, section by section; the optimizers and schedules with their parameters; the three answers."""
    sections = [_section(path, model) for path, model in all_sections()]
    return "\n".join([_INTRODUCTION, *sections, _factories(), _answers()])


def config_json_schema() -> str:
    """The JSON Schema of the config file."""
    return json.dumps(json_schema(), indent=2) + "\n"


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


def _factories() -> str:
    lines = ["## Optimizers", "", "Native ones. Any other name is a class of `torch.optim`.", ""]
    for name, factory in OPTIMIZERS.items():
        lines += _factory(name, factory)
    lines += ["## Schedules", "", "DeepSpeed's. Any other name is a class of `torch.optim.lr_scheduler`.", ""]
    for name, factory in SCHEDULES.items():
        lines += _factory(name, factory)
    return "\n".join(lines)


def _factory(name: str, factory: Factory) -> list[str]:
    lines = [f"### {name}", "", factory.summary, "", "| parameter | value | default | meaning |", "|---|---|---|---|"]
    for key, parameter in factory.parameters.items():
        lines.append(f"| `{key}` | {parameter.kind.words} | {parameter.default_words} | {parameter.meaning} |")
    return [*lines, ""]


def _answers() -> str:
    names = [
        join(path, key) for path, model in all_sections() for key in model.model_fields if key not in subsections(model)
    ]
    lines = [
        _ANSWERS,
        "### Works",
        "",
        "With the values that the tables above give: " + ", ".join(f"`{n}`" for n in names),
    ]
    lines[-1] += "."
    lines += ["", "Other ways to write a key:", "", "| key | value | meaning |", "|---|---|---|", *_rows(Answer.WORKS)]
    lines += ["", "### Noted", "", "| key | value | why it has no effect |", "|---|---|---|", *_rows(Answer.NOTED)]
    lines += ["", "### Refused", "", "| key | value | what to do |", "|---|---|---|", *_rows(Answer.REFUSED)]
    lines += [f"| `optimizer.type` | `{name}`, any case | {remedy} |" for name, remedy in REFUSED_OPTIMIZERS.items()]
    return "\n".join(lines) + "\n"


def _rows(answer: Answer) -> list[str]:
    return [f"| `{key}` | {case.values.words} | {case.reason} |" for key, case in _cases() if case.answer is answer]


def _cases() -> list[tuple[str, Case]]:
    """Every case of every key, by key."""
    rules = dict(RULES)
    for name, factory in OPTIMIZERS.items():
        rules |= {f"optimizer.params.{key} ({name})": rule for key, rule in factory.rules.items()}
    return [(key, case) for key, rule in sorted(rules.items()) for case in rule]


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
