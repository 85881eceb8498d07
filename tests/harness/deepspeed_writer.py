"""Checkpoints in DeepSpeed's format without DeepSpeed: what its 0.19.8 writes, of a model and the states given.

`test_deepspeed_real.py` compares the structure of these files with that of DeepSpeed's own.
"""

from __future__ import annotations

import enum
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LOSS_SCALER = "deepspeed.runtime.fp16.loss_scaler"
ENUM = "deepspeed.runtime.zero.config"
FRAGMENT = "deepspeed.utils.tensor_fragment"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class LossScaler:
    """Of a scale that stays."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


class DynamicLossScaler(LossScaler):
    """Of a scale that moves."""


class ZeroStageEnum(int, enum.Enum):
    """As DeepSpeed has it."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3


@dataclass
class fragment_address:  # noqa: N801
    """As DeepSpeed has it."""

    numel: int
    start: int


@contextmanager
def deepspeed_names() -> Iterator[None]:
    """The classes above are pickled under DeepSpeed's names inside this block."""
    named = {LOSS_SCALER: [LossScaler, DynamicLossScaler], ENUM: [ZeroStageEnum], FRAGMENT: [fragment_address]}
    before, own = dict(sys.modules), __name__
    for module, classes in named.items():
        parts = module.split(".")
        for i in range(1, len(parts) + 1):
            sys.modules[".".join(parts[:i])] = types.ModuleType(".".join(parts[:i]))
        for one in classes:
            setattr(sys.modules[module], one.__name__, one)
            one.__module__ = module
    try:
        yield
    finally:
        for classes in named.values():
            for one in classes:
                one.__module__ = own
        for name in [name for name in sys.modules if name.split(".")[0] == "deepspeed"]:
            del sys.modules[name]
        sys.modules.update({name: module for name, module in before.items() if name.split(".")[0] == "deepspeed"})


@dataclass
class Trained:
    """A run: its model (whose parameters are the masters), names by param group, and states by name of the parameter.

    states: "exp_avg" and so on. rest: what the optimizer keeps beside, the same for all. more: the program's own.
    """

    model: nn.Module
    groups: list[list[str]]
    hyper: list[dict[str, Any]]
    states: dict[str, dict[str, Tensor]]
    rest: dict[str, Any]
    precision: str = "fp32"
    steps: int = 3
    skipped: int = 0
    scaler: Any = field(default_factory=lambda: LossScaler(cur_scale=1.0, dynamic=False))
    lr_scheduler: dict[str, Any] | None = None
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def masters(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}

    @property
    def frozen(self) -> dict[str, Tensor]:
        return {n: p.detach().to(self.dtype) for n, p in self.model.named_parameters() if not p.requires_grad}

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]


def of_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, **more: Any) -> Trained:
    """A run as torch trained it, in fp32."""
    names = {p: n for n, p in model.named_parameters()}
    groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    hyper = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    state = {names[p]: s for p, s in optimizer.state.items()}
    first = next(iter(state.values()), {})
    keys = [k for k, v in first.items() if isinstance(v, Tensor) and v.dim()]
    states = {key: {name: s[key] for name, s in state.items()} for key in keys}
    return Trained(model, groups, hyper, states, {k: v for k, v in first.items() if k not in keys}, **more)


def write(directory: Path, run: Trained, stage: int, ranks: int) -> Path:
    """Writes DIRECTORY/global_stepN and `latest`; returns the folder."""
    folder = directory / f"global_step{run.steps}"
    folder.mkdir(parents=True)
    (directory / "latest").write_text(folder.name)
    with deepspeed_names():
        for rank in range(ranks if stage == 3 else 1):
            name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
            torch.save(_model_states(run, stage, ranks, rank), folder / name)
        prefix = "bf16_" if run.precision == "bf16" else ""
        for rank in range(ranks if stage else 0):
            states = _slices(run, ranks, rank) if stage == 3 else _partition(run, stage, ranks, rank)
            content = {"optimizer_state_dict": states, "ds_config": _config(run, stage), "ds_version": "0.19.8"}
            torch.save(content, folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


def write_universal(directory: Path, run: Trained, stage: int, ranks: int) -> Path:
    """What DeepSpeed's ds_to_universal.py makes of such a checkpoint."""
    folder = write(directory, run, stage, ranks)
    with deepspeed_names():
        common = _slices(run, 1, 0) if stage == 3 else _partition(run, stage, 1, 0)
        for path in folder.glob("*_optim_states.pt"):
            path.unlink()
        (folder / "zero").mkdir()
        for name in run.masters:
            own = folder / "zero" / name
            own.mkdir()
            values = {"fp32": run.masters[name], **{key: states[name] for key, states in run.states.items()}}
            for key, value in values.items():
                value = value.detach().clone()
                torch.save(value.view(-1) if stage == 3 else {"cat_dim": 0, "param": value}, own / f"{key}.pt")
            if stage < 3:
                torch.save(run.rest["step"], own / "step.pt")
        if stage < 3:
            common["param_groups"] = common.pop("base_optimizer_state")["param_groups"]
            common.pop("single_partition_of_fp32_groups")
        else:
            common.pop("fp32_flat_groups")
        torch.save(common, folder / "zero" / "optimizer_state.pt")
    (directory / "latest").rename(directory / "latest_universal")
    return folder


def _config(run: Trained, stage: int) -> dict[str, Any]:
    precision = {run.precision: {"enabled": True}} if run.precision != "fp32" else {}
    return {"zero_optimization": {"stage": stage}, **precision}


def _model_states(run: Trained, stage: int, ranks: int, rank: int) -> dict[str, Any]:
    def placed(name: str, value: Tensor) -> Tensor:
        parameter = value.is_floating_point() and name not in buffers
        value = value.detach().to(run.dtype) if parameter else value.detach()
        return torch.empty(0, dtype=value.dtype) if stage == 3 and parameter else value

    buffers = [n for n, _ in run.model.named_buffers() if n in run.model.state_dict()]
    state = run.model.state_dict(keep_vars=True)
    made = {id(value): placed(name, value) for name, value in state.items()}
    module = OrderedDict((name, made[id(value)]) for name, value in state.items())
    first: dict[int, str] = {}
    shared = {name: first[id(value)] for name, value in state.items() if first.setdefault(id(value), name) != name}
    frozen = OrderedDict((n, _slice(v, ranks, rank) if stage == 3 else v) for n, v in run.frozen.items())
    return {
        "module": module,
        "buffer_names": buffers,
        "optimizer": None if stage else _numbered(run),
        "param_shapes": [OrderedDict((n, run.masters[n].shape) for n in group) for group in run.groups]
        if stage
        else None,
        "frozen_param_shapes": OrderedDict((n, v.shape) for n, v in run.frozen.items()) if stage >= 2 else None,
        "shared_params": (shared if rank == 0 else {}) if stage else None,
        "frozen_param_fragments": frozen if stage >= 2 else None,
        "lr_scheduler": run.lr_scheduler,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": run.skipped,
        "global_steps": run.steps,
        "global_samples": 8 * run.steps,
        "dp_world_size": ranks,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": _config(run, stage),
        "ds_version": "0.19.8",
        **run.more,
    }


def _numbered(run: Trained) -> dict[str, Any]:
    """The optimizer's state of stage 0, as torch has it; in 16 bits with the masters beside."""
    names = [name for group in run.groups for name in group]
    state = {i: {**run.rest, **{k: of[n] for k, of in run.states.items() if n in of}} for i, n in enumerate(names)}
    numbers = iter(range(len(names)))
    groups = [{**h, "params": [next(numbers) for _ in g]} for h, g in zip(run.hyper, run.groups, strict=True)]
    inner = {"state": state, "param_groups": groups}
    if run.precision == "fp32":
        return inner
    masters = [[run.masters[name].clone() for name in group] for group in run.groups]
    scale = {"dynamic_loss_scale": False, "cur_scale": run.scaler.cur_scale, "cur_iter": run.steps}
    return {**scale, "optimizer_state_dict": inner, "fp32_groups": masters}


def _partition(run: Trained, stage: int, ranks: int, rank: int) -> dict[str, Any]:
    """Stages 1 and 2: a rank's partition of each group, filled up to a multiple of twice the ranks."""
    masters, moments, paddings, fragments = [], [], [], []
    for group in run.groups:
        numel = sum(run.masters[name].numel() for name in group)
        length = -(-numel // (2 * ranks)) * 2
        padding = min(length, length * ranks - numel) if rank == ranks - 1 else 0
        flats = {key: torch.cat([of[n].detach().reshape(-1) for n in group]) for key, of in run.states.items()}
        flat = torch.cat([run.masters[name].reshape(-1) for name in group])
        mine = [_padded(one, length * ranks)[length * rank : length * (rank + 1)] for one in (flat, *flats.values())]
        masters.append(mine[0][: length - padding].clone())
        moments.append({**run.rest, **{key: one.clone() for key, one in zip(flats, mine[1:], strict=True)}})
        paddings.append(padding)
        fragments.append(_fragments(run, group, length * rank, length * (rank + 1)))
    return {
        "loss_scaler": run.scaler,
        "dynamic_loss_scale": isinstance(run.scaler, DynamicLossScaler),
        "overflow": False,
        "clip_grad": 0.5,
        "base_optimizer_state": _state_dict(run, moments),
        "single_partition_of_fp32_groups": masters,
        "zero_stage": ZeroStageEnum(stage),
        "group_paddings": paddings,
        "param_alignment_paddings": [[0] * len(group) for group in run.groups],
        "partition_count": [ranks] * len(run.groups),
        "ds_version": "0.19.8",
        "param_slice_mappings": fragments,
    }


def _fragments(run: Trained, group: list[str], begin: int, end: int) -> OrderedDict[str, fragment_address]:
    """Where in a rank's partition a group's parameters are."""
    found = OrderedDict()
    start = 0
    for name in group:
        stop = start + run.masters[name].numel()
        if max(start, begin) < min(stop, end):
            numel = min(stop, end) - max(start, begin)
            found[name] = fragment_address(numel=numel, start=max(start, begin) - begin)
        start = stop
    return found


def _slices(run: Trained, ranks: int, rank: int) -> dict[str, Any]:
    """Stage 3: a rank's slice of each parameter, one behind the other."""

    def flat(values: dict[str, Tensor], group: list[str]) -> Tensor:
        return torch.cat([_slice(values[name], ranks, rank) for name in group])

    moments = [{**run.rest, **{key: flat(of, group) for key, of in run.states.items()}} for group in run.groups]
    return {
        "zero_stage": ZeroStageEnum.weights,
        "loss_scaler": run.scaler,
        "dynamic_loss_scale": isinstance(run.scaler, DynamicLossScaler),
        "overflow": False,
        "partition_count": ranks,
        "optimizer_state_dict": _state_dict(run, moments),
        "fp32_flat_groups": [flat(run.masters, group) for group in run.groups],
    }


def _state_dict(run: Trained, moments: list[dict[str, Any]]) -> dict[str, Any]:
    groups = [{**hyper, "params": [i]} for i, hyper in enumerate(run.hyper)]
    return {"state": dict(enumerate(moments)), "param_groups": groups}


def _slice(value: Tensor, ranks: int, rank: int) -> Tensor:
    length = -(-value.numel() // ranks)
    return _padded(value.detach().reshape(-1), length * ranks)[length * rank : length * (rank + 1)].clone()


def _padded(flat: Tensor, length: int) -> Tensor:
    """With values that no test expects at the end: they must not be read."""
    return torch.cat([flat, torch.full((length - flat.numel(),), 77.0, dtype=flat.dtype)])
