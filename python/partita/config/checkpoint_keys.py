"""The section `checkpoint` as pydantic models: what a run saves on its own, and from what it goes on."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator
from typing_extensions import Self

from partita.config.fields import OwnKey, PositiveInt, Section


class EncryptionConfig(Section):
    """The key that checkpoints are encrypted with: exactly one of its three sources."""

    key_env: Annotated[str | None, Field(min_length=1), OwnKey()] = Field(
        None, description="The name of an environment variable that holds the key."
    )
    key_file: Annotated[str | None, Field(min_length=1), OwnKey()] = Field(
        None, description="The path of a file that holds the key."
    )
    key_command: Annotated[str | None, Field(min_length=1), OwnKey()] = Field(
        None, description="A command that prints the key. Its words are split as a shell splits them; no shell runs."
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if not given:
            raise ValueError("the key is missing: give one of key_env, key_file and key_command, or null for no key")
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; leave one of them")
        return self


class CheckpointConfig(Section):
    """What a run saves on its own, what it keeps, and from which checkpoint it goes on when it starts again."""

    dir: Annotated[str | None, Field(min_length=1), OwnKey()] = Field(
        None,
        description="The folder of the checkpoints, which all ranks see. With it, a run saves on its own and goes on "
        "from there; SIGTERM and SIGUSR1 save and end it. null: only `save_checkpoint()` saves.",
    )
    interval_steps: Annotated[PositiveInt | None, OwnKey()] = Field(
        None, description="Save after each step whose number (`global_steps`) is a multiple of this."
    )
    interval_minutes: Annotated[float | None, Field(gt=0), OwnKey()] = Field(
        None, description="Save after the first step that ends this long after the last save. Rank 0's clock counts."
    )
    keep_last: Annotated[PositiveInt | None, OwnKey()] = Field(
        None, description="After a save of its own the run removes all but this many of the newest; null: none."
    )
    async_save: Annotated[bool, OwnKey()] = Field(
        False, description="Write while training goes on; false: training waits until a checkpoint is complete."
    )
    resume: Annotated[str, Field(min_length=1), OwnKey()] = Field(
        "auto",
        description="What the run goes on from when `dir` is given. `auto`: from the newest checkpoint there, or anew "
        "if there is none; `never`: anew; else the tag of a checkpoint, which must be there.",
    )
    fallback: Annotated[bool, OwnKey()] = Field(
        False,
        description="If that checkpoint is damaged, go on from the newest sound one before it, and say so; false: a "
        "damaged one is an error.",
    )
    verify: Annotated[bool, OwnKey()] = Field(
        False, description="Read the files of each checkpoint back and compare them, before older ones are removed."
    )
    encryption: Annotated[EncryptionConfig | None, OwnKey()] = Field(
        None, description="See [encryption](#checkpointencryption); null: files are not encrypted."
    )
    group_access: Annotated[bool, OwnKey()] = Field(
        False, description="The group of the files may read them too; false: their owner only."
    )

    @model_validator(mode="after")
    def _has_a_folder(self) -> Self:
        if self.dir is not None:
            return self
        asked = {"interval_steps", "interval_minutes", "keep_last", "fallback"}
        given = [name for name in type(self).model_fields if name in asked and getattr(self, name)]
        if self.resume not in ("auto", "never"):
            given.append("resume")
        if given:
            verb = "has" if len(given) == 1 else "have"
            raise ValueError(f"{' and '.join(given)} {verb} no effect without dir; set dir to the checkpoints' folder")
        return self

    @model_validator(mode="after")
    def _goes_on_from_somewhere(self) -> Self:
        if self.fallback and self.resume == "never":
            raise ValueError('fallback has no effect while resume = "never"; set resume to "auto" or fallback to false')
        return self
