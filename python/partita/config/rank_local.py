"""The keys that may differ between the ranks of a job."""

from __future__ import annotations


def rank_local_keys() -> frozenset[str]:
    """Dotted keys that concern one rank: what it reports, how long it waits, what its host has."""
    from partita.config.fields import RankLocal
    from partita.config.sections import all_sections, join

    return frozenset(
        join(path, key)
        for path, section in all_sections()
        for key, field in section.model_fields.items()
        if any(isinstance(note, RankLocal) for note in field.metadata)
    )
