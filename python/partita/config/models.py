"""The config as pydantic models. Descriptions and bounds given here are also the text of docs/config.md."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import Field, PrivateAttr, model_validator
from typing_extensions import Self

from partita.config.answers import Ignored
from partita.config.checkpoint_keys import CheckpointConfig
from partita.config.fields import (
    WHOLE,
    AutocastName,
    DeepSpeedDefault,
    FloatName,
    MasterWeights,
    NaturalInt,
    OffloadDevice,
    OwnKey,
    Params,
    PositiveInt,
    RankLocal,
    Section,
    TransportName,
)
from partita.config.monitor_keys import (
    CometConfig,
    CsvMonitorConfig,
    MonitorConfig,
    TensorBoardConfig,
    WandbConfig,
)
from partita.config.pipeline_keys import PipelineConfig
from partita.config.profile_keys import CommsLoggerConfig, FlopsProfilerConfig, TraceConfig


class OptimizerConfig(Section):
    """The optimizer that `initialize()` builds when it is given none."""

    type: str = Field(min_length=1, description="Name of an optimizer, such as `AdamW`: see [Optimizers](#optimizers).")
    params: Params = Field(default={}, description="Its arguments, such as `lr`.")


class SchedulerConfig(Section):
    """The learning-rate schedule, advanced once per optimizer step that was not skipped."""

    type: str = Field(min_length=1, description="Name of a schedule, such as `WarmupLR`: see [Schedules](#schedules).")
    params: Params = Field(default={}, description="Its arguments, such as `warmup_num_steps`.")


class Fp16Config(Section):
    """Training in float16 with fp32 master weights and a loss scale."""

    enabled: bool = Field(False, description="Hold parameters and compute in float16.")
    loss_scale: Annotated[float, Field(ge=0)] = Field(
        0.0, description="A fixed loss scale; 0 adjusts the scale to the overflows that occur."
    )
    initial_scale_power: Annotated[int, Field(ge=0, le=24), WHOLE] = Field(
        16, description="A dynamic scale starts at 2 to this power."
    )
    loss_scale_window: PositiveInt = Field(
        1000,
        description="A dynamic scale doubles in the first step without overflow after this many such steps in a row.",
    )
    hysteresis: PositiveInt = Field(2, description="Overflows it takes until a dynamic scale halves; 1: each does.")
    consecutive_hysteresis: bool = Field(
        False, description="Restore the tolerance after every good step, not only when the scale grows."
    )
    min_loss_scale: Annotated[float, Field(gt=0)] = Field(
        1.0, description="A dynamic scale never falls below this value; overflowing there is an error."
    )

    @model_validator(mode="after")
    def _minimum_is_reachable(self) -> Self:
        initial_scale = 2.0**self.initial_scale_power
        if self.loss_scale == 0 and self.min_loss_scale > initial_scale:
            raise ValueError(
                f"min_loss_scale = {self.min_loss_scale:g} is above the initial scale {initial_scale:g} "
                f"(2 to the power initial_scale_power = {self.initial_scale_power}); lower one or raise the other"
            )
        return self


class Bf16Config(Section):
    """Training in bfloat16 with fp32 master weights; its range needs no loss scale."""

    enabled: bool = Field(False, description="Hold parameters and compute in bfloat16.")
    master_weights: Annotated[MasterWeights, OwnKey()] = Field(
        "fp32",
        description="`fp32`: beside each parameter; `split`: only the 16 bits that the parameter lacks, which saves 2 "
        "bytes per parameter and gives the same bits. Split ones need the native Adam or AdamW.",
    )

    @model_validator(mode="after")
    def _masters_exist(self) -> Self:
        if self.master_weights == "split" and not self.enabled:
            raise ValueError('master_weights = "split" has no effect while enabled is false; set enabled to true')
        return self


class TorchAutocastConfig(Section):
    """Parameters stay fp32 and `torch.autocast` chooses the type of each operation."""

    enabled: bool = Field(False, description="Run the forward pass under `torch.autocast`.")
    dtype: AutocastName = Field("bfloat16", description="The type that autocast lowers operations to.")


class OffloadOptimizerConfig(Section):
    """Optimizer states on the host, and the update computed there."""

    device: OffloadDevice = Field(
        "none",
        description="`cpu`: masters, moments and reduced gradients are in host memory, and the CPU updates them.",
    )
    pin_memory: Annotated[bool, DeepSpeedDefault("false"), RankLocal()] = Field(
        True, description="Use pinned memory, which the GPU copies from and to without the CPU."
    )
    ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0, description="The share of the parameters whose states are offloaded; the rest is updated on the device."
    )
    threads: Annotated[PositiveInt | None, OwnKey(), RankLocal()] = Field(
        None,
        description="Threads of each rank for its update on the CPU; null: the cores of the rank's affinity, of which "
        "ranks with the same ones have their share. A launcher's `OMP_NUM_THREADS=1` does not matter here. A model on "
        "the CPU computes with torch's threads (`torch.set_num_threads`) in any case.",
    )


class OffloadParamConfig(Section):
    """Stage 3: each rank's shard of the parameters on the host."""

    device: OffloadDevice = Field(
        "none", description="`cpu`: shards are in host memory, and are copied to the device when they are gathered."
    )
    pin_memory: Annotated[bool, DeepSpeedDefault("false"), RankLocal()] = Field(
        True, description="As for `offload_optimizer`."
    )


class ZeroConfig(Section):
    """What is partitioned over the data-parallel ranks, and how it travels."""

    stage: Annotated[int, Field(ge=0, le=3), WHOLE] = Field(
        0,
        description="0: nothing is partitioned; 1: optimizer state; 2: optimizer state and gradients; 3: parameters "
        "too, which are there only while they compute.",
    )
    unit_classes: Annotated[list[str] | None, OwnKey()] = Field(
        None,
        description="Stage 3: names of the module classes whose parameters are gathered together; null finds the "
        "repeated layers of the model. Between CPU processes of one host nothing is gathered.",
    )
    stage3_prefetch_bucket_size: Annotated[NaturalInt, DeepSpeedDefault("50000000")] = Field(
        8_388_608,
        description="Stage 3: the next layer is gathered while one computes, and further ones while they have at most "
        "this many elements together.",
    )
    stage3_param_persistence_threshold: Annotated[NaturalInt, DeepSpeedDefault("100000")] = Field(
        10_000, description="Stage 3: parameters of at most this many elements stay on every rank."
    )
    stage3_max_live_parameters: NaturalInt = Field(
        1_000_000_000,
        description="Stage 3: elements of gathered parameters above which nothing is gathered ahead; 0: never.",
    )
    reduce_bucket_size: Annotated[PositiveInt | None, DeepSpeedDefault("500000000")] = Field(
        None,
        description="Elements per gradient collective. Smaller ones start sooner, larger ones cost less. null: 8388608 "
        "on the CPU; on GPUs 2097152 for each data-parallel rank, at least 16777216 and at most 134217728. The smaller "
        "one of this and `allgather_bucket_size` is used for both.",
    )
    allgather_bucket_size: Annotated[PositiveInt | None, DeepSpeedDefault("500000000")] = Field(
        None, description="Elements per collective that gathers the updated parameters; null: as above."
    )
    overlap_comm: Annotated[bool, DeepSpeedDefault("true in stage 3, else false")] = Field(
        True, description="Reduce gradients while backward still computes."
    )
    overlap_gather: Annotated[bool, OwnKey()] = Field(
        False,
        description="Stages 1 and 2: the next forward waits for updated parameters module by module; false: `step()` "
        "does. Then parameters may be read between a step and the next forward only through the engine "
        "(`module_state_dict()`) or after it, and in modules whose own forward runs.",
    )
    reduce_scatter: bool = Field(
        True, description="Stages 1 and 2 send each rank its shard only; false reduces whole buffers everywhere."
    )
    offload_optimizer: OffloadOptimizerConfig = Field(
        OffloadOptimizerConfig(), description="See [offload_optimizer](#zero_optimizationoffload_optimizer)."
    )
    offload_param: OffloadParamConfig = Field(
        OffloadParamConfig(), description="See [offload_param](#zero_optimizationoffload_param)."
    )
    contiguous_gradients: bool = Field(True, description="Always true: gradients are packed into flat buffers.")

    @model_validator(mode="after")
    def _offload_has_an_object(self) -> Self:
        if self.offload_optimizer.device != "none" and self.stage == 0:
            raise ValueError("offload_optimizer works on partitioned states: use stage 1, 2 or 3")
        if self.offload_param.device != "none" and self.stage < 3:
            raise ValueError("offload_param works on partitioned parameters: use stage 3")
        optimizer = self.offload_optimizer
        if self.offload_param.device != "none" and (optimizer.device == "none" or optimizer.ratio < 1):
            raise ValueError("offload_param keeps parameters where they are updated: set offload_optimizer.ratio to 1")
        return self


class ActivationCheckpointingConfig(Section):
    """Layers that keep their inputs only, and compute their activations again in backward."""

    enabled: Annotated[bool, OwnKey()] = Field(False, description="Checkpoint the layers of the model.")
    classes: Annotated[list[str] | None, OwnKey()] = Field(
        None, description="Names of the layers' classes; null finds the repeated layers of the model."
    )
    cpu_checkpointing: bool = Field(False, description="Keep the inputs of the layers in host memory.")

    @model_validator(mode="after")
    def _is_used(self) -> Self:
        if not self.enabled and self.classes is not None:
            raise ValueError("classes has no effect while enabled is false; set enabled to true")
        return self


class CommConfig(Section):
    """How bytes move between ranks."""

    transport: TransportName = Field(
        "auto",
        description="`auto`: through shared memory between CPU processes of one host, through torch.distributed "
        "elsewhere; `shared_memory`: the same, and an error where no two ranks can share memory; `torch`: always "
        "through torch.distributed.",
    )
    timeout_seconds: Annotated[float, Field(gt=0, le=1e6), RankLocal()] = Field(
        600.0,
        description="How long shared memory waits for a rank before it raises, and over NCCL a host that waits for its "
        "GPU. Over shared memory a rank that died is noticed at once. Gloo has its own, see `init_distributed()`.",
    )


class DataTypesConfig(Section):
    """Number formats other than that of the computation."""

    grad_accum_dtype: FloatName | None = Field(
        None,
        description="Type in which micro-batches are summed; null takes fp32 when gradient_accumulation_steps is "
        "above 1, else the parameters' type.",
    )
    buffer_dtype: FloatName | None = Field(
        None, description="Type that floating-point module buffers are cast to; null leaves each as it is."
    )


class Config(Section):
    """The whole configuration."""

    _ignored: tuple[Ignored, ...] = PrivateAttr(())
    _open: frozenset[str] = PrivateAttr(frozenset())

    @property
    def ignored(self) -> tuple[Ignored, ...]:
        """Keys that were accepted and have no effect of their own, and what each "auto" became."""
        return self._ignored

    @property
    def open_keys(self) -> frozenset[str]:
        """Dotted keys whose "auto" waits for a model and an optimizer, see `resolve_auto`."""
        return self._open

    def with_notes(self, ignored: Iterable[Ignored], open_keys: Iterable[str] = ()) -> Self:
        """A copy with other notes."""
        copy = self.model_copy()
        copy._ignored, copy._open = tuple(ignored), frozenset(open_keys)
        return copy

    train_batch_size: PositiveInt | None = Field(
        None, description="Samples per optimizer step over all ranks: micro-batch x accumulation x ranks."
    )
    train_micro_batch_size_per_gpu: PositiveInt | None = Field(
        None, description="Samples that one rank puts through one forward pass."
    )
    gradient_accumulation_steps: PositiveInt | None = Field(
        None, description="Micro-batches per rank whose gradients are summed before the optimizer steps."
    )
    optimizer: OptimizerConfig | None = Field(None, description="See [optimizer](#optimizer).")
    scheduler: SchedulerConfig | None = Field(None, description="See [scheduler](#scheduler).")
    fp16: Fp16Config = Field(Fp16Config(), description="See [fp16](#fp16).")
    bf16: Bf16Config = Field(Bf16Config(), description="See [bf16](#bf16).")
    torch_autocast: TorchAutocastConfig = Field(
        TorchAutocastConfig(), description="See [torch_autocast](#torch_autocast)."
    )
    zero_optimization: ZeroConfig = Field(ZeroConfig(), description="See [zero_optimization](#zero_optimization).")
    activation_checkpointing: ActivationCheckpointingConfig = Field(
        ActivationCheckpointingConfig(), description="See [activation_checkpointing](#activation_checkpointing)."
    )
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="See [checkpoint](#checkpoint).")
    pipeline: PipelineConfig = Field(PipelineConfig(), description="See [pipeline](#pipeline).")
    monitor: Annotated[MonitorConfig, OwnKey()] = Field(MonitorConfig(), description="See [monitor](#monitor).")
    tensorboard: TensorBoardConfig = Field(TensorBoardConfig(), description="See [tensorboard](#tensorboard).")
    csv_monitor: CsvMonitorConfig = Field(CsvMonitorConfig(), description="See [csv_monitor](#csv_monitor).")
    wandb: WandbConfig = Field(WandbConfig(), description="See [wandb](#wandb).")
    comet: CometConfig = Field(CometConfig(), description="See [comet](#comet).")
    gradient_clipping: Annotated[float, Field(ge=0), DeepSpeedDefault("1.0")] = Field(
        0.0, description="Largest norm of all gradients together; 0 does not clip."
    )
    communication_data_type: FloatName | None = Field(
        None, description="Type in which gradients are reduced; null takes the type they are accumulated in."
    )
    comm: Annotated[CommConfig, OwnKey()] = Field(CommConfig(), description="See [comm](#comm).")
    data_types: DataTypesConfig = Field(DataTypesConfig(), description="See [data_types](#data_types).")
    prescale_gradients: bool = Field(
        False,
        description="Divide gradients before they are summed over ranks instead of after. Sums in float16 over NCCL "
        "are divided first in any case while the loss scale is dynamic, by a power of two.",
    )
    gradient_predivide_factor: Annotated[float, Field(gt=0)] = Field(
        1.0, description="With prescale_gradients: this part of the division comes first, the rest after the sum."
    )
    steps_per_print: Annotated[NaturalInt | None, DeepSpeedDefault("null"), RankLocal()] = Field(
        10, description="Optimizer steps between two progress lines; 0 or null prints none."
    )
    wall_clock_breakdown: Annotated[bool, RankLocal()] = Field(
        False, description="Time forward, backward and step, and report them."
    )
    memory_breakdown: Annotated[bool, RankLocal()] = Field(
        False,
        description="Report the bytes of parameters, masters, optimizer states and gradients, and the process's "
        "memory: at the start, after two steps, and every steps_per_print steps.",
    )
    flops_profiler: FlopsProfilerConfig = Field(
        FlopsProfilerConfig(), description="See [flops_profiler](#flops_profiler)."
    )
    comms_logger: CommsLoggerConfig = Field(CommsLoggerConfig(), description="See [comms_logger](#comms_logger).")
    trace: Annotated[TraceConfig | None, OwnKey()] = Field(None, description="See [trace](#trace); null: no trace.")
    sync_buffers: bool = Field(
        True,
        description="After every update, buffers that differ between ranks (BatchNorm's statistics) become rank 0's; "
        "false: each rank keeps its own.",
    )
    dump_state: Annotated[bool, RankLocal()] = Field(False, description="Print the resolved configuration at start.")
    seed: Annotated[NaturalInt, OwnKey()] = Field(1234, description="Seed of the order of the data.")
    max_consecutive_skipped_steps: Annotated[PositiveInt, OwnKey()] = Field(
        100, description="After this many skipped steps in a row training stops with an error."
    )

    @property
    def records_steps(self) -> bool:
        """Whether what is known of each step is written somewhere."""
        others = (self.tensorboard, self.csv_monitor, self.wandb, self.comet)
        return self.monitor.dir is not None or any(other.enabled for other in others)

    @property
    def counts_flops(self) -> bool:
        """Whether the operations of a forward are counted."""
        return self.monitor.flops and (self.records_steps or self.monitor.peak_tflops is not None)

    @model_validator(mode="after")
    def _one_precision(self) -> Self:
        switches = {"fp16": self.fp16.enabled, "bf16": self.bf16.enabled, "torch_autocast": self.torch_autocast.enabled}
        enabled = [f"{name}.enabled" for name, is_on in switches.items() if is_on]
        if len(enabled) > 1:
            raise ValueError(f"{' and '.join(enabled)} exclude each other; leave one of them true")
        return self

    @model_validator(mode="after")
    def _predivision_is_used(self) -> Self:
        if self.gradient_predivide_factor != 1.0 and not self.prescale_gradients:
            raise ValueError(
                f"gradient_predivide_factor = {self.gradient_predivide_factor:g} has no effect while "
                "prescale_gradients is false; set prescale_gradients to true or the factor to 1"
            )
        return self
