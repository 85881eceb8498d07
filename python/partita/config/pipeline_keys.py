"""The section `pipeline` as a pydantic model: in which order the ranks of a pipeline compute."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from partita.config.fields import NaturalInt, OwnKey, PositiveInt, Section


class PipelineConfig(Section):
    """In which order the ranks of a pipeline compute. It is read for a `PipelineModule` only."""

    schedule: Annotated[str, Field(min_length=1), OwnKey()] = Field(
        "1f1b",
        description="The name of a schedule, such as `gpipe`, `1f1b`, `interleaved`, `zb-h1` or `zb-v`, or the path of "
        "a schedule file; `partita schedule` lists, draws and proves them.",
    )
    chunks: Annotated[PositiveInt | None, OwnKey()] = Field(
        None,
        description="Stages that each rank has; null: as many as the schedule needs, which is 2 if it has a choice.",
    )
    activation_checkpoint_interval: NaturalInt = Field(
        0,
        description="So many layers after each other keep their input only, and compute their activations again in "
        "backward; 0: what `PipelineModule` was given.",
    )
