"""What every part of a training job needs and no part changes."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

import torch

from partita.comm import (
    Communicator,
    Entries,
    GridShape,
    ProcessGrid,
    is_joined,
    join_job,
    leave_job,
    place_in_job,
    require_same_on_all_ranks,
    text_by_rank,
    world_communicator,
)
from partita.config import BatchSizes, ConfigError, ConfigSource, load_config, resolve_batch_sizes
from partita.device import Cores, Streams, own_cores, streams_of, threads_for
from partita.run.buckets import default_bucket_size
from partita.run.console import ConsoleHandler
from partita.run.precision import Precision, precision_of, short_name
from partita.units import StagePolicy, stage_policy

if TYPE_CHECKING:
    from partita.config import Config

logger = logging.getLogger("partita")


@dataclass(frozen=True)
class Run:
    """A training job before it has a model.

    [Note: sums in float16]
    A transport that adds in float16 overflows at the sum of N ranks, N times sooner than at their mean. So gradients
    are divided first, by the largest power of two that is at most N, as they are packed, and the update multiplies
    by it again. A power of two changes no bit of a normal number; a subnormal one loses bits at its end. With a dynamic
    loss scale nothing is lost by that: the scale, which rises until something overflows, rises by as much. A fixed
    scale does not, nor do gradients without one: there nothing is divided.

    Attributes:
        config: with all three batch sizes and both bucket sizes filled in.
        batch: the batch sizes, over the data-parallel ranks.
        precision: the number formats.
        policy: what the ZeRO stage decides.
        streams: the order of work on the device that trains.
        grid: the ranks, by axis. Gradients, gathers, means, batch sizes and samples follow `grid.data`; the norm, the
            decision about a step and its reports concern `grid.world`.
    """

    config: Config
    batch: BatchSizes
    precision: Precision
    policy: StagePolicy
    streams: Streams
    grid: ProcessGrid

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.streams.device

    @property
    def host_threads(self) -> int | None:
        """Threads of native work on the host where the model is on a GPU; None: as many as torch uses."""
        return self.streams.host_threads

    @property
    def world_size(self) -> int:
        """The number of ranks of the job."""
        return self.grid.world.world_size

    @property
    def is_first(self) -> bool:
        """Whether this is the rank of the job that speaks."""
        return self.grid.world.rank == 0

    @property
    def predivide(self) -> float:
        """What gradients are divided by before they are summed over ranks. See [Note: sums in float16]."""
        ranks = self.grid.data.world_size
        if self.config.prescale_gradients:
            factor = self.config.gradient_predivide_factor
            return factor if factor != 1.0 else float(ranks)
        is_dynamic = self.precision.scales_loss and self.config.fp16.loss_scale == 0
        if not self.grid.data.sums_in_fp32 and is_dynamic and self.precision.reduces_in_fp16:
            return 2.0 ** (ranks.bit_length() - 1)
        return 1.0

    @property
    def mean(self) -> float:
        """What turns a stored gradient into the mean over micro-batches and ranks.

        A stored gradient is the sum over micro-batches and data-parallel ranks, divided by `predivide`.
        """
        return self.predivide / (self.batch.accumulation * self.grid.data.world_size)

    @property
    def splits_masters(self) -> bool:
        """Whether the masters of bf16 parameters are the 16 bits that these lack."""
        return splits_masters(self.config)

    @property
    def bucket_numel(self) -> int:
        """Elements of what communicates together, at the most, but for larger parameters."""
        zero = self.config.zero_optimization
        sizes = (zero.reduce_bucket_size, zero.allgather_bucket_size)
        return min(size for size in sizes if size is not None)


def splits_masters(config: Config) -> bool:
    """Whether the masters of bf16 parameters are the 16 bits that these lack."""
    return config.bf16.master_weights == "split"


def policy_of(config: Config, pipe: int | None = None) -> StagePolicy:
    """What the ZeRO stage of a config decides. pipe: as for `begin_run`."""
    zero = config.zero_optimization
    return stage_policy(zero.stage, reduce_scatter=zero.reduce_scatter, reduces_once=pipe is not None)


def checked_config(source: ConfigSource, loader_batch_size: int | None = None, pipe: int | None = None) -> Config:
    """The config, with all that can be wrong about it before the ranks have joined. pipe: as for `begin_run`.

    Raises:
        ConfigError: the config does not make sense, for this number of ranks.
        ValueError: the ranks do not divide evenly among the ranks of a pipeline.
    """
    config = load_config(source)
    _batch_sizes(config, GridShape.of_world(place_in_job()[1], pipe or 1).data, loader_batch_size)
    return config


def begin_run(
    source: ConfigSource,
    device: torch.device,
    exits: ExitStack,
    shared: Entries = (),
    dtypes: Iterable[torch.dtype] = (),
    loader_batch_size: int | None = None,
    on_failure: ExitStack | None = None,
    pipe: int | None = None,
) -> Run:
    """Reads the config and joins the ranks of the job. A collective.

    Args:
        source: the config, see `load_config`.
        device: where the model is.
        exits: closes what was made here.
        shared: what all ranks must have been given alike. It is compared before anything depends on it.
        dtypes: of the model's parameters.
        loader_batch_size: of the program's DataLoader, which is the micro-batch; None: there is none.
        on_failure: takes the default process group down, if it was made here. None: that group stays.
        pipe: the ranks of a pipeline that hold one model together; None: there is no pipeline.

    Raises:
        ConfigError: the config does not make sense, for this number of ranks.
        ValueError: ranks were not given the same; names the first difference.
        RuntimeError: the device or the transport cannot be had.
    """
    config = checked_config(source, loader_batch_size, pipe)
    if device.type == "cuda":
        # What is made without naming a device belongs here, and not on GPU 0. First, as whoever works on another device
        # than the current one makes the latter current again, which takes memory there.
        torch.cuda.set_device(device)
    streams = streams_of(device)
    if on_failure is not None and not is_joined():
        on_failure.callback(leave_job)
    timeout = timedelta(seconds=config.comm.timeout_seconds)
    join_job(timeout)
    _show_log_on(place_in_job()[0])
    require_same_on_all_ranks(shared, device)
    grid = ProcessGrid(partial(world_communicator, config.comm.transport, timeout, device), pipe or 1)
    exits.callback(grid.close)
    _acquaint(config, streams, grid)
    _list_ignored(config, grid.world.rank)
    batch = _batch_sizes(config, grid.data.world_size, loader_batch_size)
    precision = precision_of(config, batch.accumulation, dtypes)
    if precision.given and grid.world.rank == 0:
        _say_given(precision)
    return Run(
        config=_filled(config, batch, device, grid),
        batch=batch,
        precision=precision,
        policy=policy_of(config, pipe),
        streams=streams,
        grid=grid,
    )


def _acquaint(config: Config, streams: Streams, grid: ProcessGrid) -> None:
    """What the device and the ranks must know of each other. A collective, where the config offloads."""
    streams.while_waiting = grid.check_progress
    if config.comms_logger.enabled or config.trace is not None:
        grid.observe(streams.mark)
    streams.host_threads = host_threads(config, streams.device, grid.world)


def _filled(config: Config, batch: BatchSizes, device: torch.device, grid: ProcessGrid) -> Config:
    """With all batch sizes, and the bucket sizes that the config leaves to the device."""
    zero = config.zero_optimization
    default = default_bucket_size(device.type, grid.data.world_size)
    sizes = {"reduce_bucket_size": zero.reduce_bucket_size, "allgather_bucket_size": zero.allgather_bucket_size}
    buckets = {name: default if size is None else size for name, size in sizes.items()}
    filled = {
        "train_batch_size": batch.train,
        "train_micro_batch_size_per_gpu": batch.micro,
        "gradient_accumulation_steps": batch.accumulation,
        "zero_optimization": zero.model_copy(update=buckets),
    }
    return config.model_copy(update=filled)


def host_threads(config: Config, device: torch.device, world: Communicator) -> int | None:
    """As `Run.host_threads` has it; only where the host updates. A collective, where the config offloads."""
    offload = config.zero_optimization.offload_optimizer
    if device.type == "cpu" or offload.device == "none":
        return None
    own = own_cores()
    by_rank = [Cores.of_text(text) for text in text_by_rank(world, own.text())]
    return offload.threads or threads_for(own, by_rank)  # a key that may differ from rank to rank comes last


def _say_given(precision: Precision) -> None:
    """The program has chosen the number format, and the config is silent."""
    names = sorted(map(short_name, precision.given))
    logger.info(
        "the model has %s parameters and the config asks for no precision: each parameter is trained in its own, "
        "16-bit ones with fp32 masters%s%s",
        " and ".join(names),
        ", the loss with a dynamic scale" if precision.scales_loss else "",
        f'; "{names[0]}": {{"enabled": true}} converts the whole model' if len(names) == 1 else "",
    )


def _list_ignored(config: Config, rank: int) -> None:
    """Rank 0 says in one line which keys have no effect of their own, and which expect more than they get."""
    if rank:
        return
    notes = [str(note) for note in config.ignored if not note.warns]
    if notes:
        logger.info("config, noted: %s", "; ".join(notes))
    for note in config.ignored:
        if note.warns:
            logger.warning("config: %s", note)


def _batch_sizes(config: Config, world_size: int, loader_batch_size: int | None) -> BatchSizes:
    micro = config.train_micro_batch_size_per_gpu
    given = f"training_data is a DataLoader with batch_size = {loader_batch_size}, which is that of a micro-batch"
    if None not in (micro, loader_batch_size) and micro != loader_batch_size:
        raise ConfigError(
            f"{given}, and the config has train_micro_batch_size_per_gpu = {micro}: leave one out, or make them equal"
        )
    try:
        return resolve_batch_sizes(
            train=config.train_batch_size,
            micro=loader_batch_size if micro is None else micro,
            accumulation=config.gradient_accumulation_steps,
            world_size=world_size,
        )
    except ConfigError as error:
        if loader_batch_size is None:
            raise
        raise ConfigError(f"{given}, which the config contradicts:\n{error}") from None


def _show_log_on(rank: int) -> None:
    """Prints the library's messages on rank 0, unless the program set up logging itself."""
    if rank == 0 and not logger.handlers and not logging.getLogger().handlers:
        handler = ConsoleHandler()
        handler.setFormatter(logging.Formatter("[partita] %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
