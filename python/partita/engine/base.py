"""What every engine answers, keeps and ends, whatever its schedule."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, SupportsFloat

import torch
from torch import Tensor, nn

from partita.data import ShardedLoader
from partita.engine.keeper import Keeper
from partita.engine.save_beside import SaveBeside
from partita.engine.saving import KeepsState
from partita.model import ModelPart, weight_buckets
from partita.monitor import CommsRow, Waits, Watching, gather_waits
from partita.optim import ShardedOptimizer
from partita.run import Run
from partita.step import OptimizerStep

logger = logging.getLogger("partita")


class EngineBase(KeepsState):
    """A model in training.

    An engine composes what others made; it has no arithmetic of its own. A subclass adds its calls and overrides
    nothing.

    Attributes:
        module: the model as the program gave it.
        config: with all batch sizes filled in.
        optimizer, lr_scheduler, dataloader: None where there is none.
        client_state: what the program wants back after a restart. It is saved with every checkpoint, unless
            `save_checkpoint` gets another one, and a run that resumes on its own (the config's `checkpoint`) finds
            here what was saved. Empty in a run that begins anew.
        resumed_from: the checkpoint from which the run has gone on on its own; None: it began anew.

    Args:
        exits: undoes what was made for the engine; the engine's own once it is complete.
    """

    def __init__(
        self,
        run: Run,
        module: nn.Module,
        parts: Sequence[ModelPart],
        step: OptimizerStep,
        optimizer: ShardedOptimizer | None,
        lr_scheduler: Any,
        dataloader: ShardedLoader | None,
        exits: ExitStack,
    ) -> None:
        from partita.checkpoint import protection_for  # with pydantic, which `import partita` leaves out

        super().__init__(module)
        self.config = run.config
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.dataloader = dataloader
        self._run = run
        self._parts = list(parts)
        self._step = step
        self._calls = run.grid.calls
        self._is_destroyed = False
        self._beside = SaveBeside(parts)
        self._protection = protection_for(run.config.checkpoint, run.grid.world)
        self._announce()
        self.client_state: dict[str, Any] = {}
        self._keeper = Keeper(run, step.controller, exits, self._protection)
        self.resumed_from = self._keeper.resume(self)
        self._watching = Watching(run, parts, step.timers, self.global_steps, exits)
        self._exits = exits.pop_all()  # the last thing that may fail is done

    # -- what a run is asked

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self._run.device

    @property
    def global_rank(self) -> int:
        """This process among all."""
        return self._run.grid.world.rank

    @property
    def local_rank(self) -> int:
        """This process among those of its host, as the launcher numbered it."""
        return int(os.environ.get("LOCAL_RANK", 0))

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._run.grid.world.world_size

    @property
    def global_steps(self) -> int:
        """Optimizer steps so far, the skipped ones too."""
        return self._step.global_steps

    @property
    def global_samples(self) -> int:
        """Samples of these steps, over all ranks."""
        return self._step.global_samples

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by before backward; 1 outside float16."""
        return self._step.controller.loss_scale.scale

    @property
    def skipped_steps(self) -> int:
        """Updates skipped because gradients were not finite."""
        return self._step.controller.loss_scale.skipped_steps

    @property
    def last_known_step_was_skipped(self) -> bool:
        """Whether the last step whose outcome the host knows was skipped. Nobody waits for it: on a GPU that is the
        step before the last one."""
        return self._step.last_known_was_skipped

    def train_batch_size(self) -> int:
        """Samples per update over all ranks."""
        return self._run.batch.train

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples per forward of one rank."""
        return self._run.batch.micro

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches per update."""
        return self._run.batch.accumulation

    def get_global_grad_norm(self) -> float | None:
        """2-norm of the last step's mean gradient over all parameters, before clipping; None before the first step."""
        return self._step.grad_norm()

    def grad_norm_tensor(self) -> Tensor:
        """`get_global_grad_norm()` as float32 without dimensions, on the device: nobody waits. NaN before the first
        step."""
        if not self.global_steps:
            return torch.full((), float("nan"), dtype=torch.float32, device=self.device)
        return self._step.controller.grad_norm()

    def set_gradient_clipping(self, max_norm: float) -> None:
        """From the next update on this is the largest norm of all gradients together, in the place of the config's
        `gradient_clipping`; 0 does not clip. All ranks give the same number.

        Raises:
            ValueError: `max_norm` is negative or NaN.
        """
        if not max_norm >= 0:
            raise ValueError(f"set_gradient_clipping({max_norm}): give a norm above 0, or 0 for no clipping")
        self._step.clip = 0.0 if max_norm == float("inf") else float(max_norm)

    def get_lr(self) -> list[float]:
        """The learning rate of each param group."""
        self._step.learn()
        return self._step.learning_rates()

    def waits(self) -> Waits:
        """Which rank waited how long for which other, in the last step and since the engine began; `print()` shows a
        table. A collective.

        Over shared memory a wait is put down to the rank that came last. Over torch.distributed on the CPU a rank knows
        how long it waited, and in a collective not for whom: the rank that waits least is the slowest one. Over NCCL
        the GPU waits, and nothing is known.
        """
        self._require_parts("waits()")
        with self._calls.inside("waits()"):
            return gather_waits(self._run.grid.world, self._step.controller.ledger)

    def weights(self, bucket_bytes: int = 256 * 2**20) -> Iterator[list[tuple[str, Tensor]]]:
        """The whole weights as the model computes with them, and its buffers, a bucket at a time: to feed a model that
        generates or evaluates elsewhere, which takes each bucket before the next is made.

        Names are those of the state dict. A tensor belongs to the program. Shared parameters come under each of their
        names. In a pipeline these are the weights of this rank's layers. In stage 3 a collective: all ranks go through
        all buckets.

        Args:
            bucket_bytes: the most that a bucket has, if it has more than one tensor.

        Raises:
            ValueError: `bucket_bytes` is not positive.
            RuntimeError: the engine has been destroyed, or has taken a step before the last bucket.
        """
        if bucket_bytes < 1:
            raise ValueError(f"weights(bucket_bytes={bucket_bytes}): give 1 or more")
        self._require_whole("weights()")
        with self._call_of_all("weights()") if self._run.policy.shards_params else nullcontext():
            self._wait_for_parameters()
        return self._buckets(weight_buckets(self.module, bucket_bytes), self.global_steps)

    def _buckets(
        self, buckets: Iterator[list[tuple[str, Tensor]]], begun_at: int
    ) -> Iterator[list[tuple[str, Tensor]]]:
        while True:
            self._require_whole("weights()")
            if self.global_steps != begun_at:
                raise RuntimeError(
                    f"weights() began at step {begun_at}, and the engine is at step {self.global_steps} now: take all "
                    "buckets before the next step"
                )
            with self._calls.inside("weights()"):
                bucket = next(buckets, None)
            if bucket is None:
                return
            yield bucket

    def log_comms(self) -> list[CommsRow]:
        """What this rank has sent and received so far, by operation and size; rank 0 prints a table. Concerns this rank
        alone; on a GPU the host waits for it.

        Raises:
            RuntimeError: the config's `comms_logger` is not enabled.
        """
        return self._watching.log_comms()

    def _after_update(self) -> None:
        """What is saved, and saved on its own, goes on after each update."""
        with self._calls.inside("step()"):
            self._beside.after_update()
        self._watching.after_update(self.global_steps)
        self._keeper.after_update(self)

    def log(self, values: Mapping[str, SupportsFloat]) -> None:
        """Records numbers of the program, such as a validation loss, at the present step (`global_steps`).

        They go where the config's `monitor`, `tensorboard`, `csv_monitor`, `wandb` and `comet` say. Rank 0 alone
        writes its own; all ranks may call this. A tensor on a GPU is waited for.

        Raises:
            TypeError, ValueError: a name is empty or taken, or a value is not one number; names it.
            RuntimeError: the engine has been destroyed.
        """
        self._require_parts("log()")
        self._step.monitor.log(self.global_steps, values)

    # -- the end

    def destroy(self) -> None:
        """Lets go of the model: hooks are removed, groups are left, and buffers are freed with the last parameter that
        lies in them.

        In stage 3 the parameters of the model have no values any more: take `module_state_dict()` before. A save beside
        training is finished; that is a collective, and may raise CheckpointError.
        """
        if self._is_destroyed:
            return
        self._is_destroyed = True
        unfinished = max(part.accumulation.unfinished for part in self._parts)
        if unfinished and self._run.is_first:
            logger.warning(
                f"the run ends {_count(unfinished, 'micro-batch')} into a step of {self._run.batch.accumulation} "
                "(gradient_accumulation_steps), whose gradients are in no update: give each step all its micro-batches"
            )
        with ExitStack() as ends:  # all of them, whatever one raises
            ends.callback(self._let_go)
            ends.callback(self._exits.close)
            if self._calls.has_failed:
                self._give_up()
                return
            if self._beside.path is not None:
                self.wait_for_save()
            self._keeper.settle(self)

    def _give_up(self) -> None:
        """After a failed collective the others do not come: nobody waits for them, for gathers, or for a save."""
        if self._beside.path is not None:
            logger.error(f"the checkpoint '{self._beside.path}' was not finished: a collective has failed")
        for part in self._parts:
            part.gathers.abandon()

    def _let_go(self) -> None:
        self.optimizer = self.lr_scheduler = None
        self._parts.clear()
        self._beside.close()

    def _announce(self) -> None:
        if not self._run.is_first:
            return
        units = [unit for part in self._parts for unit in part.units]
        optimizer = "no optimizer" if self.optimizer is None else type(self.optimizer.inner).__name__
        batch = self._run.batch
        over = f" over {self._run.grid.world.transport}" if self.world_size > 1 else ""
        numel = sum(p.numel() for unit in units for p in unit.parameters)
        trained = f"{_count(numel, 'parameter')} in {_count(len(units), 'unit')}" if numel else "nothing is trained"
        pipe = self._run.grid.shape.pipe
        if pipe > 1:
            over += f" in pipelines of {pipe}"
            trained = f"rank 0: {trained}"
        host = self._run.host_threads
        beside = "" if host is None else f" and {_count(host, 'thread')} of the host"
        limit = self.config.gradient_clipping  # said in any case: DeepSpeed clips when the config does not have the key
        clipped = f"gradients clipped at norm {limit:g}" if limit else "gradients not clipped"
        logger.info(
            f"ZeRO stage {self._run.policy.stage}, {_count(self.world_size, 'rank')}{over}, "
            f"{self._run.precision.name}, {optimizer} on {self._run.streams.name}{beside}; {trained}; {clipped}; "
            f"batch {batch.train} = {batch.micro} x {_count(batch.accumulation, 'micro-batch')} "
            f"x {_count(self._run.grid.data.world_size, 'rank')}"
        )
        if self.device.type == "cpu" and torch.cuda.is_available():
            logger.warning("the model is on the CPU and trains there; for a GPU: model.to('cuda') before initialize()")
        if self.config.dump_state:
            secret = {"comet": {"api_key"}}
            logger.info("config: %s", self.config.model_dump_json(indent=2, exclude=secret))


def _count(number: int, thing: str) -> str:
    plural = "" if number == 1 else "es" if thing.endswith("ch") else "s"
    return f"{number:,} {thing}{plural}"
