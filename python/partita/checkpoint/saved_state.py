"""state.json: the small states of a run, and the program's own."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.strict_json import parse_json

STATE = "state.json"


class SavedState(BaseModel):
    """sections: by name, the same on all ranks. ranks: those that differ, by rank. client_state: the program's.
    aliases: other names of tensors in the model's state dict, with the name under which the files have each.
    parameters: names of parameters in the model, with those in files, where they differ; sections have the former.

    What is in a section is its owner's matter, see `partita.model.plain`.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    sections: dict[str, JsonValue]
    ranks: list[dict[str, JsonValue]]
    client_state: JsonValue
    aliases: dict[str, str]
    parameters: dict[str, str]


def state_text(state: SavedState) -> str:
    """The text of the file."""
    return json.dumps(state.model_dump())


def parse_state(data: bytes, where: str) -> SavedState:
    """Reads the file.

    Args:
        where: its path, for errors.

    Raises:
        CheckpointError: it is no such file.
    """
    content: Any = parse_json(data, where)
    try:
        return SavedState.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"'{where}' is no {STATE}: {place}: {first['msg']}") from None
