"""What to say about a key that is not in the config: where it belongs, or what was probably meant."""

from __future__ import annotations

from partita.config.deepspeed_keys import RULES
from partita.config.fields import Section
from partita.config.nearest import nearest
from partita.config.sections import all_sections, join


def explain_unknown_key(path: str, key: object, section: type[Section] | None) -> str:
    """The part of the message after 'section.key: '. `section` None: only DeepSpeed has the section at `path`."""
    homes = [join(home, key) for home, model in all_sections() if home != path and key in model.model_fields]
    if 0 < len(homes) <= 2:  # 'enabled' or 'type' are at home in many places, which helps nobody
        return f"unknown key here; did you mean {' or '.join(repr(home) for home in homes)}?"

    own = list(section.model_fields) if section else []
    of_deepspeed = [rule.rpartition(".")[2] for rule in RULES if rule.rpartition(".")[0] == path]
    if (meant := nearest(str(key), own) or nearest(str(key), of_deepspeed)) is not None:
        return f"unknown key; did you mean {meant!r}?"
    where = f"of {path}" if path else "here"
    return f"unknown key; valid keys {where} are {', '.join(own or of_deepspeed)}"
