"""What to say about a key that is not in the config: whose it is, or what was probably meant."""

from __future__ import annotations

from partita.config.deepspeed_keys import DEEPSPEED_ONLY_KEYS
from partita.config.fields import Section
from partita.config.nearest import nearest
from partita.config.sections import all_sections, join


def explain_unknown_key(path: str, key: object, section: type[Section]) -> str:
    """The part of the message after 'section.key: '."""
    hint = DEEPSPEED_ONLY_KEYS.get(join(path, key))
    if hint is not None:
        return f"DeepSpeed has this key, this version of Partita does not; {hint or 'remove it'}"

    homes = [join(home, key) for home, model in all_sections() if home != path and key in model.model_fields]
    if 0 < len(homes) <= 2:  # 'enabled' or 'type' are at home in many places, which helps nobody
        return f"unknown key here; did you mean {' or '.join(repr(home) for home in homes)}?"

    if (meant := nearest(str(key), section.model_fields)) is not None:
        return f"unknown key; did you mean {meant!r}?"
    return f"unknown key; valid keys {f'of {path}' if path else 'here'} are {', '.join(section.model_fields)}"
