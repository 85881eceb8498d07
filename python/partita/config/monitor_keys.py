"""The sections of a run's watching as pydantic models: where what is known of each step is written."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from partita.config.fields import NaturalInt, OwnKey, PositiveInt, RankLocal, Section

ProgressName = Literal["auto", "line", "lines", "off"]
CometMode = Literal["get", "create", "get_or_create"]


class MonitorConfig(Section):
    """What is recorded of each step, and Partita's own file of it. Rank 0 alone writes."""

    dir: Annotated[str | None, Field(min_length=1), OwnKey()] = Field(
        None,
        description="The folder of `metrics.jsonl`, one JSON object for each step, which `partita plot` draws. A run "
        "that resumes goes on in the file. Each job has its own, and each engine of a program. null: there is none.",
    )
    interval_steps: Annotated[PositiveInt, OwnKey()] = Field(
        1, description="Record after each step whose number is a multiple of this; rates are means since the last."
    )
    progress: Annotated[ProgressName, OwnKey(), RankLocal()] = Field(
        "auto",
        description="`line`: one line that is rewritten, on a terminal; `lines`: one every `steps_per_print` steps; "
        "`off`: neither. `auto`: `line` on a terminal where the config says nothing of `steps_per_print` and the "
        "program has set up no logging, else `lines`.",
    )
    tokens_per_sample: Annotated[NaturalInt | None, OwnKey()] = Field(
        None,
        description="Tokens of a sample, for tokens per second; 0: none are counted; null: the elements of `input_ids`,"
        " or of the batch's first tensor if that has whole numbers in two dimensions.",
    )
    flops: Annotated[bool, OwnKey()] = Field(
        True, description="Count the operations of one forward, for FLOP per second, when something records them."
    )
    peak_tflops: Annotated[float | None, Field(gt=0), OwnKey()] = Field(
        None,
        description="What a device can do at best, in 10^12 operations per second, for the MFU; null: known for "
        "common GPUs in 16 bits.",
    )


class TensorBoardConfig(Section):
    """Event files for TensorBoard (`pip install 'partita[monitor]'`), over the number of samples."""

    enabled: bool = Field(False, description="Write them.")
    output_path: str = Field("", description="The folder in which `job_name` is made; empty: the current one.")
    job_name: str = Field("DeepSpeedJobName", min_length=1, description="The folder of this job.")


class CsvMonitorConfig(Section):
    """One CSV file for each value, over the number of samples."""

    enabled: bool = Field(False, description="Write them.")
    output_path: str = Field("", description="The folder in which `job_name` is made; empty: the current one.")
    job_name: str = Field("DeepSpeedJobName", min_length=1, description="The folder of this job.")


class WandbConfig(Section):
    """A run of Weights & Biases (`pip install wandb`); `WANDB_MODE=offline` needs no network."""

    enabled: bool = Field(False, description="Send what is recorded.")
    group: str | None = Field(None, description="What runs are grouped by.")
    team: str | None = Field(None, description="The team, or user, that the run belongs to.")
    project: str = Field("deepspeed", min_length=1, description="The project.")


class CometConfig(Section):
    """An experiment of Comet (`pip install comet_ml`). What is null follows Comet's own settings."""

    enabled: bool = Field(False, description="Send what is recorded.")
    samples_log_interval: PositiveInt = Field(100, description="Samples between two values of the same name.")
    project: str | None = Field(None, description="The project.")
    workspace: str | None = Field(None, description="The workspace.")
    api_key: str | None = Field(None, description="The key; the variable `COMET_API_KEY` keeps it out of files.")
    experiment_name: str | None = Field(None, description="The name of the experiment.")
    experiment_key: str | None = Field(None, description="The key of the experiment: 32 to 50 letters and digits.")
    online: bool | None = Field(None, description="false: into a local archive.")
    mode: CometMode | None = Field(None, description="Whether an experiment is gone on with or made.")
