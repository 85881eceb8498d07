"""The sections that watch a run as pydantic models: its FLOPs, its collectives, and a trace of some steps."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator
from typing_extensions import Self

from partita.config.fields import WHOLE, NaturalInt, OwnKey, PositiveInt, RankLocal, Section

FilePath = Annotated[str, Field(min_length=1)]


class FlopsProfilerConfig(Section):
    """A table of parameters, multiply-accumulates (MACs) and forward time by module, of one step."""

    enabled: bool = Field(False, description="Count in one step, take times in the next one, and print the table.")
    profile_step: NaturalInt = Field(
        1, description="The optimizer step whose first micro-batch is counted, from 1 on; 0 is 1 too."
    )
    module_depth: Annotated[int, Field(ge=-1), WHOLE] = Field(
        -1, description="How deep the tree goes: 0 is the model alone; -1 goes to the innermost modules."
    )
    top_modules: PositiveInt = Field(1, description="Of each depth, the summary names this many modules.")
    detailed: bool = Field(True, description="Print the tree too; false prints the summary alone.")
    output_file: Annotated[FilePath | None, RankLocal()] = Field(
        None, description="Where rank 0 writes the table; null prints it to the log."
    )
    recompute_fwd_factor: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="The part of the forward that backward computes again: 1 with all layers checkpointed. It counts "
        "in the FLOPs of a step.",
    )


class CommsLoggerConfig(Section):
    """What the collectives carry: counts, bytes, times and bandwidths, which `engine.log_comms()` prints."""

    enabled: bool = Field(False, description="Keep account of collectives, sends and receives.")
    verbose: bool = Field(False, description="Rank 0 prints a line about each one.")
    prof_all: bool = Field(True, description="All of them; false: those of `prof_ops`.")
    prof_ops: list[str] = Field(
        [],
        description="Names of operations: `all_reduce`, `reduce_scatter`, `all_gather`, `broadcast`, `send`, `recv`, "
        "`barrier`; a longer name of torch.distributed that begins so means the same.",
    )
    debug: bool = Field(False, description="Tell operations apart by the engine call that they are in.")


class TraceConfig(Section):
    """A trace of some steps for [Perfetto](https://ui.perfetto.dev): phases, collectives, modules, pipeline actions."""

    steps: Annotated[list[PositiveInt], Field(min_length=2, max_length=2), OwnKey()] = Field(
        description="The first and the last optimizer step of the trace, from 1 on."
    )
    path: Annotated[FilePath, OwnKey()] = Field(
        description="The JSON file, with all ranks, that rank 0 writes after the last step."
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.steps[0] > self.steps[1]:
            raise ValueError(f"steps = {self.steps}: the first step comes after the last one; exchange them")
        return self
