"""What "auto" becomes once there are a model, an optimizer and data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from partita.config.answers import Ignored

if TYPE_CHECKING:
    from partita.config.models import Config

_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@dataclass(frozen=True)
class Given:
    """What the program gives to the engine beside the config.

    Attributes:
        compute: the 16-bit type of the model's parameters, "fp16" or "bf16"; None: another.
        optimizer, scheduler: what they are, in words; None: the config's.
        micro_batch: samples in a batch of the data loader; None: there is none.
    """

    compute: str | None = None
    optimizer: str | None = None
    scheduler: str | None = None
    micro_batch: int | None = None


def resolve_auto(config: Config, given: Given) -> Config:
    """The config of a run: every "auto" has its value, and `ignored` says which.

    An optimizer or a schedule of the program takes the place of the config's, as in DeepSpeed.
    """
    resolved, became = _precision(config, given)
    resolved, sizes = _batch_sizes(resolved, given)
    became |= sizes
    notes = [replace(note, reason=became.get(note.key, note.reason)) for note in config.ignored]
    for section, what in (("optimizer", given.optimizer), ("scheduler", given.scheduler)):
        if what is not None and getattr(config, section) is not None:
            notes = [note for note in notes if not note.key.startswith(f"{section}.")]
            value = getattr(config, section).type
            notes.append(Ignored(section, value, f"the program gives {what}, which is taken"))
    return resolved.with_notes(notes)


def _precision(config: Config, given: Given) -> tuple[Config, dict[str, str]]:
    """A 16-bit model decides; a type that the config enables by itself leaves nothing to decide."""
    sections = {name for name in ("fp16", "bf16") if f"{name}.enabled" in config.open_keys}
    enabled = next((n for n in ("fp16", "bf16", "torch_autocast") if getattr(config, n).enabled), None)
    update: dict[str, Any] = {}
    became = {}
    for name in sections:
        is_on = enabled is None and given.compute == name
        why = f"{enabled} is enabled" if enabled else f"the parameters of the model are {given.compute or 'not 16-bit'}"
        became[f"{name}.enabled"] = f"is {'true' if is_on else 'false'}: {why}"
        if is_on:
            update[name] = getattr(config, name).model_copy(update={"enabled": True})
    return config.model_copy(update=update), became


def _batch_sizes(config: Config, given: Given) -> tuple[Config, dict[str, str]]:
    became = {}
    train, micro, accumulation = _SIZES
    values = {name: getattr(config, name) for name in _SIZES}
    is_known = values[train] is not None and values[accumulation] is not None
    if micro in config.open_keys and not is_known:
        if given.micro_batch is not None:
            values[micro] = given.micro_batch
            became[micro] = f"is {given.micro_batch}, the batch size of the data loader"
        elif values[train] is None:
            became[micro] = "is 1: nothing says how many samples a forward pass has; write the number"
    if accumulation in config.open_keys and (values[train] is None or values[micro] is None):
        became[accumulation] = "is 1, the default"
    return config.model_copy(update=values), became
