"""Finding one's way in the tree of models by dotted keys."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator

from partita.config.fields import Section
from partita.config.models import Config


def subsections(section: type[Section]) -> dict[str, type[Section]]:
    """Key -> model, for the keys of a section that hold an object with known keys."""
    found = {key: _section_in(field.annotation) for key, field in section.model_fields.items()}
    return {key: model for key, model in found.items() if model is not None}


def all_sections(section: type[Section] = Config, path: str = "") -> Iterator[tuple[str, type[Section]]]:
    """(dotted key, model) of a section and of everything below it; the whole config has the key ''."""
    yield path, section
    for key, model in subsections(section).items():
        yield from all_sections(model, join(path, key))


def may_be_null(annotation: object) -> bool:
    """Whether null is a value of a field with this annotation."""
    return types.NoneType in typing.get_args(annotation)


def join(path: str, key: object) -> str:
    """The dotted key of `key` inside the section at `path`."""
    return f"{path}.{key}" if path else str(key)


def _section_in(annotation: object) -> type[Section] | None:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next(filter(None, map(_section_in, typing.get_args(annotation))), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None
