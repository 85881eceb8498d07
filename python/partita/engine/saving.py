"""What an engine keeps: weights and training state, read, written, saved and loaded."""

from __future__ import annotations

import importlib.metadata
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.module import _IncompatibleKeys

from partita.comm import by_rank
from partita.config import save_config
from partita.data import ShardedLoader
from partita.engine.as_module import AsModule
from partita.engine.phase import WHOLE_AGAIN, Phase
from partita.engine.save_beside import SaveBeside
from partita.model import CommonAccumulation, ModelPart, RandomState, Section, TrainState, clone_state_dict
from partita.optim import HyperParameters, ShardedOptimizer
from partita.run import Run
from partita.step import OptimizerStep
from partita.zero import Loaded, OnRanks, PartlyLoadedError, WeightSource, load_on_ranks

if TYPE_CHECKING:
    from partita.checkpoint import Protection
    from partita.config import Config

logger = logging.getLogger("partita")


class KeepsState(AsModule):
    """The part of an engine that reads, writes, saves and loads what it trains. See `EngineBase` for the attributes."""

    config: Config
    optimizer: ShardedOptimizer | None
    lr_scheduler: Any
    dataloader: ShardedLoader | None
    client_state: dict[str, Any]
    _run: Run
    _parts: list[ModelPart]
    _step: OptimizerStep
    _beside: SaveBeside
    _saves_in: Path | None = None  # the folder of the last checkpoint
    _is_torn = False  # a load has failed after it had begun to write
    _protection: Protection

    def module_state_dict(self, rank: int | None = None) -> dict[str, Any]:
        """The model's state dict with memory of its own (a plain `state_dict()` shares the flat buffers).

        In a pipeline that of this rank's layers; `save_model()` writes all of them. In stage 3 a collective, unit by
        unit.

        Args:
            rank: the one that wants it. The others get an empty dict and need no memory for it. None: all want it.
        """
        with self._call_of_all("module_state_dict()") if self._run.policy.shards_params else nullcontext():
            self._wait_for_parameters()
            return clone_state_dict(self.module, wanted=rank in (None, self.global_rank))

    def load_module_state_dict(self, source: WeightSource, *, strict: bool = True, rank: int = 0) -> list[str]:
        """Gives the model the weights of a full state dict or of safetensors files, see `partita.zero.load_weights`.

        In a pipeline, too, the source has the whole model, and each rank takes its own layers.
        """
        return self._load_weights(source, strict, rank).missing

    def _load_weights(self, source: WeightSource, strict: bool, rank: int = 0) -> Loaded:
        with self._call_of_all("load_module_state_dict()"):
            self._wait_for_parameters()
            self._beside.finish()
            replicas = {name: owner for part in self._parts for name, owner in part.replicas.items()}
            try:
                return load_on_ranks(
                    self.module, source, strict=strict, rank=rank, on=OnRanks(self._run.grid, replicas)
                )
            except PartlyLoadedError:
                self._is_torn = True
                raise

    def sync_buffers(self) -> None:
        """All ranks have rank 0's buffers, BatchNorm's statistics say: those that a state dict has. A collective.

        The engine does that after every update. A program calls it where it has changed buffers otherwise and evaluates
        or saves before the next update.
        """
        for part in self._parts:
            part.share_buffers()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The model's state dict as any module gives it, names with "module."; its tensors are the parameters.

        Raises:
            RuntimeError: parameters are partitioned (stage 3): `module_state_dict()` gathers them.
        """
        self._wait_for_parameters()
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """Gives the model the weights of a dict with the names of `state_dict()`; a collective, rank 0's values count.

        Raises:
            ValueError: names or shapes do not fit, or `assign` is asked for.
        """
        if assign:
            raise ValueError("load_state_dict(assign=True) would replace parameters that are trained: leave assign out")
        bare = next((name for name in state_dict if not name.startswith("module.")), None)
        if bare is not None:
            raise ValueError(
                f"'{bare}' does not begin with 'module.', as the names of engine.state_dict() do: give a state dict of "
                "the model to engine.load_module_state_dict()"
            )
        state = {name.removeprefix("module."): value for name, value in state_dict.items()}
        loaded = self._load_weights(state, strict)
        unexpected = state.keys() - loaded.names
        return _IncompatibleKeys(
            [f"module.{name}" for name in loaded.missing], [f"module.{name}" for name in unexpected]
        )

    def save_model(self, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Writes the model's state dict into safetensors files, each rank its own part; a collective.

        A path that ends in ".safetensors" is one file. Another is a folder with model.safetensors, or with files of
        at most 5 GB and an index, which `from_pretrained` opens where a config.json is beside them. Nothing is
        gathered. Files appear when they are complete; an older export is there until then. Shared parameters are
        written under each of their names.

        Args:
            dtype: of the floating-point tensors; None: as the model computes. torch.float32 writes the masters of
                what is trained.

        Raises:
            ValueError: something in the state dict is no tensor, safetensors has no such dtype, or the path is that
                of a pickle or in a checkpoint.
            OSError: the files cannot be written; raised on all ranks.
        """
        from partita.checkpoint import CheckpointError, ModelWeights, save_model_files

        with self._call_of_all("save_model()"):
            self._require_whole("save_model()")
            self._wait_for_parameters()
            for part in self._parts:
                part.adopt_written_parameters()
            state = TrainState(self._parts, [], self._run.grid)
            try:
                save_model_files(ModelWeights(state, dtype), Path(path), state.world)
            except CheckpointError as error:
                raise OSError(str(error)) from error

    def save_16bit_model(self, save_dir: str | os.PathLike[str], save_filename: str = "model.safetensors") -> None:
        """`save_model` in the dtype that the model computes in, under DeepSpeed's name.

        Under the default name, a model of more than 5 GB becomes several files with an index.
        """
        with self._call_of_all("save_16bit_model()"):
            whole = save_filename != "model.safetensors"
            self.save_model(Path(save_dir) / save_filename if whole else save_dir)

    def save_config(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Writes the whole config as JSON, batch sizes resolved; returns the path.

        Args:
            path: None: partita_config.json beside the last checkpoint that this engine has saved, else in the working
                directory; rank 0 alone writes it, and logs where.
        """
        if path is not None:
            save_config(self.config, path)
            return Path(path)
        place = (Path() if self._saves_in is None else self._saves_in) / "partita_config.json"
        if self._run.is_first:
            save_config(self.config, place)
            logger.info("the config is in '%s'", place.absolute())
        return place

    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: str | int | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        earlier: str | os.PathLike[str] | None = None,
    ) -> Path:
        """Saves all that the run needs to go on as `save_dir/tag`; returns that path. A collective.

        All ranks write their own parts into the same files, so all must see one folder. A checkpoint appears when it
        is complete and on the disk; an older one of the same tag is there until then. Any number of ranks, stage and
        precision loads it, and `from_pretrained` opens its weights. docs/checkpoint-format.md describes the files.

        With `checkpoint.async_save` in the config it is written while training goes on. The call then returns before
        the checkpoint is there: `wait_for_save()` waits for it, as do the next save, a load, and `destroy()`. An error
        is raised by one of these, or by a `step()`. Who writes into parameters by hand waits first.

        Args:
            tag: the checkpoint's name; None: global_stepN.
            client_state: what the program wants back: numbers, strings, bytes, tensors, and lists, tuples and dicts of
                such. Rank 0's is saved. None: `engine.client_state`.
            save_latest: the checkpoint is the one that is loaded when no tag is given.
            earlier: a checkpoint whose files of frozen parameters are linked if they are the same; None: the latest.

        Raises:
            RuntimeError: in the midst of a step.
            TypeError, ValueError: a state cannot be saved; names it.
            CheckpointError: the checkpoint was not written; says why, on all ranks. Earlier ones are still there.
        """
        from partita.checkpoint import About, Save  # with pydantic, which `import partita` leaves out

        with self._call_of_all("save_checkpoint()"):
            self._require_whole("save_checkpoint()")
            self._beside.finish()
            name = f"global_step{self._step.global_steps}" if tag is None else str(tag)
            like = None if earlier is None else Path(earlier)
            about = About(
                self._step.global_steps, self._step.global_samples, _facts(self._run, self._parts), save_latest, like
            )
            client = self.client_state if client_state is None else client_state
            save = partial(Save, self.train_state(), Path(save_dir), name, about, client, protection=self._protection)
            path = self._beside.begin(save) if self.config.checkpoint.async_save else save().finish()
            self._saves_in = Path(save_dir)
            return path

    @property
    def save_under_way(self) -> Path | None:
        """The checkpoint that is being saved beside training; None: there is none."""
        return self._beside.path

    def wait_for_save(self) -> Path | None:
        """Waits for the save beside training (`checkpoint.async_save`); its path, None if there is none. A collective.

        Raises:
            CheckpointError: the checkpoint was not written; says why, on all ranks.
        """
        with self._call_of_all("wait_for_save()"):
            return self._beside.finish()

    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | int | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        fallback: bool = False,
    ) -> tuple[Path, dict[str, Any]]:
        """Goes on from a checkpoint; returns its path and the program's `client_state`. A collective.

        Every rank reads its own parts twice: all ranks compare them with the digests first, and then each reads them
        to where they belong. So a damaged checkpoint changes nothing, and a load needs no memory. With the ranks and
        settings of the run that saved, everything that follows is what that run would have done, bit for bit. With
        others the samples are the same, the random numbers are not.

        If a file is changed between the two, or cannot be read any more, the state is loaded in part. Then forwards,
        steps and saves raise until a load with all states and `load_module_strict` has succeeded.

        Args:
            tag: the checkpoint's name; None: the one that `load_dir/latest` names.
            load_module_strict: the model must have the parameters and buffers of the checkpoint. False loads those
                that are there and have the same shape, and logs the others.
            load_optimizer_states: False leaves out the optimizer's hyper-parameters and states.
            load_lr_scheduler_states: False leaves out the schedule.
            load_module_only: loads weights and buffers, and nothing else.
            fallback: if the checkpoint is damaged, the newest sound one before it is loaded, with a warning in the log.

        Raises:
            RuntimeError: in the midst of a step.
            CheckpointError: there is no such checkpoint, it is damaged, or it does not fit; says which file, tensor
                or parameter, on all ranks.
        """
        from partita.checkpoint import Wanted, load, load_sound

        with self._call_of_all("load_checkpoint()"):
            self._require_parts("load_checkpoint()")
            self._beside.finish()
            wanted = Wanted(
                sections=not load_module_only,
                optimizer=load_optimizer_states,
                schedule=load_lr_scheduler_states,
                strict=load_module_strict,
            )
            take, name = load_sound if fallback else load, None if tag is None else str(tag)
            state = self.train_state()
            try:
                path, client_state = take(state, Path(load_dir), name, wanted, self._protection)
            except BaseException:
                self._is_torn |= state.is_torn
                raise
            self._is_torn &= wanted != Wanted()
            return path, client_state

    def _require_parts(self, call: str) -> None:
        """Raises RuntimeError if the engine has let go of the model: it would save nothing, over something perhaps."""
        if not self._parts:
            raise RuntimeError(f"{call} was called after engine.destroy(): call it before")

    def _require_whole(self, call: str) -> None:
        """Raises RuntimeError if there is nothing to be saved, or a mixture."""
        self._require_parts(call)
        if self._is_torn:
            raise RuntimeError(f"{call} was called after {Phase.TORN.value}: {WHOLE_AGAIN}")

    def train_state(self) -> TrainState:
        """Everything that must survive a restart.

        Raises:
            TypeError: the lr_scheduler has no state that could be saved.
        """
        sections = [Section("step", self._step)]
        sections.append(Section("accumulation", CommonAccumulation([part.accumulation for part in self._parts])))
        if self.optimizer is not None and self._step.sharded is not None:
            sections.append(Section("optimizer", HyperParameters(self.optimizer)))
            sections.append(Section("optimizer_states", self._step.sharded.update))
        if self.lr_scheduler is not None:
            if not hasattr(self.lr_scheduler, "state_dict"):
                name = type(self.lr_scheduler).__name__
                raise TypeError(f"lr_scheduler: a {name} has no state_dict(), so it could not go on after a restart")
            sections.append(Section("lr_scheduler", self._step.schedule or self.lr_scheduler))
        if self.dataloader is not None:
            sections.append(Section("data", self.dataloader))
        sections.append(Section("random", RandomState(self.device)))
        return TrainState(self._parts, sections, self._run.grid)

    def _call_of_all(self, name: str) -> AbstractContextManager[None]:
        """The block of a call that is a collective; other ranks in other calls are named."""
        return self._run.grid.world.call_of_all(name)

    def _wait_for_parameters(self) -> None:
        for part in self._parts:
            part.gathers.wait()


def _facts(run: Run, parts: Sequence[ModelPart]) -> dict[str, Any]:
    """What people want to know of a checkpoint. A collective in a pipeline."""
    return {
        "partita": importlib.metadata.version("partita"),
        "torch": torch.__version__,
        "stage": run.policy.stage,
        "precision": run.precision.name,
        "transport": run.grid.world.transport,
        "parameters": int(sum(by_rank(run.grid.pipe, float(sum(_trained_numels(parts)))))),
    }


def _trained_numels(parts: Sequence[ModelPart]) -> Iterator[int]:
    """Of each parameter that this rank trains, without replicas."""
    for part in parts:
        for slot in (slot for unit in part.units for slot in unit.layout.slots):
            if slot.name not in part.replicas:
                yield slot.numel
