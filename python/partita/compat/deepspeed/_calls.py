"""Calls of DeepSpeed's engines of a few lines each, in terms of Partita's."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from partita import RepeatingLoader
from partita.compat.deepspeed.monitor.monitor import MonitorMaster
from partita.engine import EngineBase, PipelineEngine


class _HoldsEngine:
    @property
    def _inner(self) -> EngineBase:
        raise NotImplementedError


class SmallCalls(_HoldsEngine):
    """Of every engine.

    Attributes:
        optimizer: None where there is none.
    """

    optimizer: Any
    _monitor: MonitorMaster | None = None
    mp_world_size = 1

    @property
    def dp_world_size(self) -> int:
        """Ranks that have the same parameters and other data."""
        batch = self._inner.train_micro_batch_size_per_gpu() * self._inner.gradient_accumulation_steps()
        return self._inner.train_batch_size() // batch

    @property
    def monitor(self) -> MonitorMaster:
        """Writes to the sinks of the config, beside the engine itself."""
        if self._monitor is None:
            self._monitor = MonitorMaster(self._inner.config)
        return self._monitor

    def get_batch_info(self) -> tuple[int, int, int]:
        """Samples of a step over all ranks, samples of a micro-batch, micro-batches of a step."""
        engine = self._inner
        sizes = engine.train_batch_size(), engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
        return sizes

    def get_mom(self) -> list[Any]:
        """Betas of each param group, or its momentum; empty without an optimizer."""
        return [group.get("betas", group.get("momentum")) for group in self._groups()]

    def get_type(self) -> list[Any]:
        """What the param groups have as "type"."""
        return [group.get("type") for group in self._groups()]

    def _groups(self) -> list[dict[str, Any]]:
        return [] if self.optimizer is None else list(self.optimizer.param_groups)

    def get_data_parallel_rank(self) -> int:
        """This rank among those with the same parameters."""
        return self._inner.global_rank % self.dp_world_size

    def get_model_parallel_rank(self) -> int:
        """0: a rank is alone in its group."""
        return 0

    get_tensor_parallel_rank = get_model_parallel_rank

    def coalesce_grad_reduction(self) -> AbstractContextManager[None]:
        """A block without effect: backwards before a `step()` all count, with and without it."""
        return nullcontext()

    def empty_partition_cache(self) -> None:
        """Nothing stays gathered after a backward, so there is nothing to free."""


class PipelineCalls(_HoldsEngine):
    """Of a pipeline."""

    _data: Any = None  # what train_batch() reads when it is given nothing

    @property
    def _pipeline(self) -> PipelineEngine:
        engine = self._inner
        assert isinstance(engine, PipelineEngine)
        return engine

    def train_batch(self, data_iter: Any = None) -> Tensor:
        """One whole optimizer step; returns the mean loss.

        Args:
            data_iter: an iterator or a DataLoader of pairs; None: what `set_dataiterator()` or `set_dataloader()` gave,
                else the engine's own loader.
        """
        return self._pipeline.train_batch(self._data if data_iter is None else data_iter)

    def eval_batch(
        self,
        data_iter: Any,
        return_logits: bool = False,
        compute_loss: bool = True,
        reduce_output: str | None = "avg",
        bcast_loss: bool = True,
        num_micro_batches: int | None = None,
    ) -> Tensor:
        """The mean loss of some micro-batches on all ranks, in evaluation mode and without gradients.

        Args:
            bcast_loss: without effect; all ranks have the loss.

        Raises:
            ValueError: logits, or losses that are not averaged, are asked for.
        """
        if return_logits or not compute_loss or reduce_output != "avg":
            raise ValueError(
                "eval_batch(return_logits=True), (compute_loss=False) and (reduce_output other than 'avg'): a "
                "pipeline gives the mean loss; compute what else is wanted in loss_fn"
            )
        return self._pipeline.eval_batch(data_iter, num_micro_batches)

    def set_dataiterator(self, iterator: Any) -> None:
        """What `train_batch()` reads when it is given nothing."""
        self._data = iterator

    def set_dataloader(self, loader: Iterable[Any]) -> None:
        """The same, epoch after epoch."""
        self._data = RepeatingLoader(loader)

    def get_pipeline_parallel_rank(self) -> int:
        """The first stage that this rank has."""
        engine = self._pipeline
        placed = engine.schedule.stage_ranks
        return placed.index(engine.global_rank // (engine.world_size // (max(placed) + 1)))

    def is_gradient_accumulation_boundary(self) -> bool:
        """True: a call is a whole step."""
        return True

    def reset_activation_shape(self) -> None:
        """Nothing to do: shapes may change at any time."""
