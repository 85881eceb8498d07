"""`partita.pipeline.PipelineModule` with DeepSpeed's topology and questions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import partita.pipeline
from partita.compat.deepspeed._absent import absent_attribute, absent_names
from partita.compat.deepspeed.runtime.activation_checkpointing.checkpointing import checkpoint
from partita.compat.deepspeed.runtime.pipe.topology import PipeDataParallelTopology, ProcessTopology
from partita.pipeline import LayerSpec, TiedLayerSpec

__all__ = ["LayerSpec", "PipelineModule", "TiedLayerSpec"]


class PipelineModule(partita.pipeline.PipelineModule):
    """See `partita.pipeline.PipelineModule`.

    Args:
        topology: gives the number of stages in place of `num_stages`: axes "pipe", "data" and "model" in this order;
            "model" has one rank.
        activation_checkpoint_func: `deepspeed.checkpointing.checkpoint`, torch's or None, which all mean the same;
            another function is refused.
        others: as there.

    Raises:
        ValueError: the topology has another form, or contradicts `num_stages`.
    """

    def __init__(
        self,
        layers: Iterable[Any],
        num_stages: int | None = None,
        topology: ProcessTopology | None = None,
        loss_fn: Callable[..., Any] | None = None,
        seed_layers: bool = False,
        seed_fn: None = None,
        base_seed: int = 1234,
        partition_method: str = "parameters",
        activation_checkpoint_interval: int = 0,
        activation_checkpoint_func: Callable[..., Any] | None = None,
        checkpointable_layers: Sequence[str] | None = None,
        dynamic_shape: bool = False,
    ) -> None:
        super().__init__(
            layers,
            _stages_of(topology, num_stages),
            None,
            loss_fn,
            seed_layers,
            seed_fn,
            base_seed,
            partition_method,
            activation_checkpoint_interval,
            None if activation_checkpoint_func is checkpoint else activation_checkpoint_func,
            checkpointable_layers,
            dynamic_shape,
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise absent_attribute(name, ["deepspeed.pipe.PipelineModule"], error) from None

    def num_pipeline_stages(self) -> int:
        """Stages of the pipeline."""
        return self.num_stages

    def set_checkpoint_interval(self, interval: int) -> None:
        """Of so many layers only what goes into the first is kept; before `initialize()`."""
        self.activation_checkpoint_interval = interval

    def topology(self) -> ProcessTopology:
        """Where the ranks are: stages, and their copies."""
        _, world_size = partita.comm.place_in_job()
        return PipeDataParallelTopology(self.num_stages, world_size // self.num_stages)


def _stages_of(topology: ProcessTopology | None, num_stages: int | None) -> int | None:
    if topology is None:
        return num_stages
    axes = [axis for axis in topology.get_axis_names() if axis in ("pipe", "data")]
    if topology.get_dim("pipe") < 1 or axes not in (["pipe"], ["pipe", "data"]) or topology.get_dim("model") > 1:
        raise ValueError(
            f"PipelineModule: topology has axes {topology.axes} of {topology.dims} ranks; here they are 'pipe', then "
            "'data', and no other axis has more than one rank"
        )
    stages = topology.get_dim("pipe")
    if num_stages not in (None, stages):
        raise ValueError(f"PipelineModule: num_stages = {num_stages}, and the topology has {stages}: give one of them")
    return stages


__getattr__ = absent_names(__name__)
