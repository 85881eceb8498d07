"""The JSON Schema of a config file: what loads validates, so that an editor marks only what is refused."""

from __future__ import annotations

from typing import Any

from partita.config.answers import Answer, Rule
from partita.config.deepspeed_keys import RULES
from partita.config.models import Config
from partita.config.parameters import OPTIMIZERS, REQUIRED, SCHEDULES, Factory
from partita.config.sections import all_sections, subsections

_AUTO = {"const": "auto"}


def json_schema() -> dict[str, Any]:
    """The schema of the models, with "auto", the keys that are noted, and the parameters of what can be named."""
    schema = Config.model_json_schema()
    places = {model.__name__: (path, model) for path, model in all_sections()}
    for name, place in ((None, schema), *schema["$defs"].items()):
        path, model = places[name or "Config"]
        for key, value in place["properties"].items():
            if key not in subsections(model) and key not in place.get("required", ()):
                place["properties"][key] = _with_auto(value)
            elif "default" in value:
                place["properties"][key] = _or_null(value)
        place["properties"] |= _noted_keys(path, place["properties"])
        place["patternProperties"] = {r"^(_|#|\$|//)": {"description": "A comment."}}
    for name, factories in (("OptimizerConfig", OPTIMIZERS), ("SchedulerConfig", SCHEDULES)):
        schema["$defs"][name] |= _by_type(factories)
    return schema


def _with_auto(schema: dict[str, Any]) -> dict[str, Any]:
    about: dict[str, Any] = {key: schema[key] for key in ("default", "description", "title") if key in schema}
    return {"anyOf": [{key: value for key, value in schema.items() if key not in about}, _AUTO], **about}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A section; null asks for nothing."""
    if "$ref" not in schema:
        return schema
    return {"anyOf": [{"$ref": schema["$ref"]}, {"type": "null"}]} | {k: v for k, v in schema.items() if k != "$ref"}


def _noted_keys(path: str, own: dict[str, Any]) -> dict[str, Any]:
    """Keys that only DeepSpeed has, and that load."""
    start = f"{path}." if path else ""
    keys: dict[str, list[str]] = {}
    for dotted, rule in RULES.items():
        key = dotted.removeprefix(start).split(".")[0]
        if dotted.startswith(start) and key not in own and _loads(rule):
            keys.setdefault(key, []).append(rule[0].reason)
    return {key: {"deprecated": True, "description": " ".join(reasons)} for key, reasons in keys.items()}


def _loads(rule: Rule) -> bool:
    return any(case.answer is not Answer.REFUSED for case in rule)


def _by_type(factories: dict[str, Factory]) -> dict[str, Any]:
    return {
        "allOf": [
            {
                "if": {"properties": {"type": {"const": name}}, "required": ["type"]},
                "then": {"properties": {"params": _params(factory)}},
            }
            for name, factory in factories.items()
        ]
    }


def _params(factory: Factory) -> dict[str, Any]:
    properties = {
        key: {"description": p.meaning, "anyOf": [p.kind.schema, _AUTO]}
        | ({} if p.default is REQUIRED else {"default": p.default})
        for key, p in factory.parameters.items()
    }
    properties |= {
        key: {"deprecated": True, "description": rule[0].reason} for key, rule in factory.rules.items() if _loads(rule)
    }
    required = [key for key, parameter in factory.parameters.items() if parameter.default is REQUIRED]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
