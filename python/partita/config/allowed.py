"""What a key may hold, in words: one wording for error messages and for the documentation."""

from __future__ import annotations

import json
from typing import Any

from partita.config.fields import Section

_TYPE_WORDS = {
    "array": "a list",
    "boolean": "true or false",
    "integer": "an integer",
    "null": "null",
    "number": "a number",
    "object": "an object",
    "string": "a string",
}


def allowed_values(section: type[Section]) -> dict[str, str]:
    """Key -> the values it takes, such as 'an integer from 0 to 24'."""
    properties = section.model_json_schema()["properties"]
    return {key: _in_words(schema) for key, schema in properties.items()}


def _in_words(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_in_words(choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(json.dumps(value) for value in schema["enum"])
    if "$ref" in schema:
        return _TYPE_WORDS["object"]
    return _TYPE_WORDS[schema["type"]] + _range(schema)


def _range(schema: dict[str, Any]) -> str:
    if "minimum" in schema and "maximum" in schema:
        return f" from {schema['minimum']} to {schema['maximum']}"
    if "minimum" in schema:
        return f" >= {schema['minimum']}"
    if "exclusiveMinimum" in schema:
        return f" > {schema['exclusiveMinimum']}"
    return " that is not empty" if schema.get("minLength") else ""
