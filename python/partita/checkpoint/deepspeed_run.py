"""A checkpoint of DeepSpeed's as what a checkpoint of Partita has: tensors by place, and small states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from partita.checkpoint import deepspeed_sections as sections
from partita.checkpoint.deepspeed_files import DeepSpeedFiles, load_dict, load_inert
from partita.checkpoint.deepspeed_order import names_in_order
from partita.checkpoint.deepspeed_states import (
    FlatGroup,
    Parts,
    Shape,
    Trained,
    dense,
    fragments,
    from_flat_groups,
    from_slices,
    numel_of,
)
from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.places import MODEL, Place, of_quantity
from partita.checkpoint.saved_state import SavedState
from partita.model import WEIGHT, to_plain

NOT_IN_FILES = ("data", "random")  # sections that DeepSpeed saves nothing for


@dataclass
class DeepSpeedRun:
    """tensors: by place, in the order of files. notes: what does not come along, for people."""

    tensors: dict[Place, Parts]
    small: SavedState
    step: int
    samples: int
    facts: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def read_run(files: DeepSpeedFiles, *, weights_only: bool = False, any_objects: bool = False) -> DeepSpeedRun:
    """Reads what small there is, and finds where the tensors are.

    Args:
        weights_only: leaves out what the optimizer keeps, but not its masters.
        any_objects: see `load_inert`.

    Raises:
        CheckpointError: a file is damaged, or does not have what DeepSpeed writes; names it.
    """
    try:
        return _Reader(files, weights_only, any_objects).run()
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"[:200]
        raise CheckpointError(f"'{files.folder}' is not as DeepSpeed writes checkpoints ({what})") from error


class _Reader:
    def __init__(self, files: DeepSpeedFiles, weights_only: bool, any_objects: bool) -> None:
        self._files = files
        self._weights_only = weights_only
        self._any_objects = any_objects
        self._notes: list[str] = []
        self._models = [load_dict(path, any_objects) for path in files.model]
        self._model = self._models[0]
        self._module: Mapping[str, Any] = _mapping(self._model.get("module") or {}, files.model[0], "module")
        self._scaler: Any = None
        self._groups: Sequence[Mapping[str, Any]] = []

    def run(self) -> DeepSpeedRun:
        if self._model.get("ds_autoep_layers") or self._model.get("autoep_layers"):
            raise CheckpointError(f"'{self._files.model[0]}' has experts that ranks share (AutoEP), which is not read")
        self._aliases = self._find_aliases()
        trained = self._trained()
        if self._weights_only:
            for one in trained.values():
                one.elements.clear()
        tensors = self._model_tensors(trained)
        masters: dict[Place, Parts] = {}
        for name, one in trained.items():
            place = Place(MODEL, name)
            if tensors[place].dtype != torch.float32:
                masters[of_quantity(WEIGHT, place)] = one.master
            masters.update((of_quantity(key, place), parts) for key, parts in one.elements.items())
        tensors.update(masters)
        small, step = self._small(trained)
        return DeepSpeedRun(
            tensors, small, step["global_steps"], step["global_samples"], self._facts(trained), self._notes
        )

    # -- tensors

    def _find_aliases(self) -> dict[str, str]:
        """Other names of tensors, with the first one: what DeepSpeed says, and what the file has twice."""
        aliases = {str(alias): str(name) for alias, name in (self._model.get("shared_params") or {}).items()}
        first: dict[Any, str] = {}
        for name, value in self._module.items():
            if isinstance(value, Tensor) and value.numel() and name not in aliases:
                same = (value.untyped_storage()._cdata, value.storage_offset(), tuple(value.shape), value.stride())
                if first.setdefault(same, name) != name:
                    aliases[name] = first[same]
        return {alias: name for alias, name in aliases.items() if alias != name}

    def _trained(self) -> dict[str, Trained]:
        if self._files.parameters:
            return self._universal()
        if not self._files.optimizer:
            return self._numbered()
        states = [load_dict(path, self._any_objects) for path in self._files.optimizer]
        first = self._files.optimizer[0]
        optim = [_mapping(state.get("optimizer_state_dict"), first, "optimizer_state_dict") for state in states]
        counts = optim[0].get("partition_count", len(optim))
        if (count := max(counts) if isinstance(counts, list) else counts) != len(optim):
            raise CheckpointError(
                f"'{self._files.folder}' has optimizer states of {len(optim)} ranks, and {count} saved it: files are "
                "missing, or others are of another run"
            )
        if isinstance(counts, list) and len(set(counts)) > 1:
            raise CheckpointError(f"'{first}' has experts that ranks share, which is not read")
        if optim[0].get("ds_zero_partition_groups"):
            raise CheckpointError(f"'{first}' has experts that ranks share (AutoEP), which is not read")
        self._scaler = optim[0].get("loss_scaler")
        if "fp32_flat_groups" in optim[0]:
            self._require_models(len(optim))
            return from_slices(self._flat_groups(optim, "fp32_flat_groups", "optimizer_state_dict"))
        return from_flat_groups(self._flat_groups(optim, "single_partition_of_fp32_groups", "base_optimizer_state"))

    def _require_models(self, ranks: int) -> None:
        if len(self._models) != ranks:
            raise CheckpointError(
                f"'{self._files.folder}' has model states of {len(self._models)} ranks, and optimizer states of {ranks}"
            )

    def _flat_groups(self, optim: Sequence[Mapping[str, Any]], masters: str, kept: str) -> list[FlatGroup]:
        """The groups of all ranks.

        Args:
            masters, kept: under which names the files have the masters, and what the optimizer keeps.
        """
        shapes = _shapes(self._model.get("param_shapes"), self._files.model[0])
        base = [one[kept] for one in optim]
        if isinstance(base[0], list):  # DeepSpeed's elastic checkpoints have the states alone
            states = base
        else:
            self._groups = base[0]["param_groups"]
            numbers = [number for group in self._groups for number in group["params"]]
            states = [[one["state"].get(number, {}) for number in numbers] for one in base]
        for path, one, state in zip(self._files.optimizer, optim, states, strict=True):
            if not len(one[masters]) == len(state) == len(shapes):
                raise CheckpointError(
                    f"'{path}' has {len(one[masters])} groups of masters and {len(state)} of states, and the model's "
                    f"file has {len(shapes)}"
                )
        paddings = optim[0].get("param_alignment_paddings") or [[0] * len(group) for group in shapes]
        return [
            FlatGroup(group, paddings[g], [one[masters][g] for one in optim], [state[g] for state in states])
            for g, group in enumerate(shapes)
        ]

    def _universal(self) -> dict[str, Trained]:
        """A folder of files for each parameter."""
        common = load_dict(self._files.common, self._any_objects)
        self._scaler = common.get("loss_scaler")
        inner = common.get("optimizer_state_dict")
        inner = inner if isinstance(inner, Mapping) else common
        self._groups = inner.get("param_groups", [])
        counts = [one.get("step") for one in _mapping(inner.get("state", {}), self._files.common, "state").values()]
        shapes = {
            k: v for group in _shapes(self._model.get("param_shapes"), self._files.model[0]) for k, v in group.items()
        }
        found = {}
        for name, shape in shapes.items():
            folder = self._files.parameters.get(name)
            if folder is None or not (folder / "fp32.pt").is_file():
                raise CheckpointError(f"'{self._files.common.parent / name / 'fp32.pt'}' is missing")
            values = {p.stem: _file_tensor(p, shape) for p in sorted(folder.glob("*.pt")) if p.stem != "step"}
            trained = found[name] = Trained(values.pop("fp32"), values)
            if (folder / "step.pt").is_file():
                trained.rest["step"] = load_inert(folder / "step.pt")
            elif counts:
                trained.rest["step"] = counts[0]
        return found

    def _numbered(self) -> dict[str, Trained]:
        """Stage 0: one file has everything, and the optimizer's states by number."""
        saved = self._model.get("optimizer")
        if not isinstance(saved, Mapping) or self._weights_only:
            if isinstance(saved, Mapping):
                self._scaler = saved if "cur_scale" in saved else None
            return {}
        self._scaler = saved if "cur_scale" in saved else None
        if saved.get("cur_scale", 1) != 1:
            self._notes.append(
                "DeepSpeed 0.19 does not scale fp16 losses in stage 0, and divides gradients by the scale all "
                "the same: the moments are as much smaller, and the next steps are not those that DeepSpeed would make"
            )
        inner = saved.get("optimizer_state_dict", saved)
        self._groups = groups = inner["param_groups"]
        state = inner["state"]
        masters = saved.get("fp32_groups")
        if "fp32_groups_flat" in saved:
            return self._numbered_flat(saved["fp32_groups_flat"], state)
        numbers = [number for group in groups for number in group["params"]]
        flat_masters = [m for group in masters for m in group] if masters is not None else [None] * len(numbers)
        shapes = self._parameter_shapes()
        asked = [[_shape_kept(state.get(number)) for number in group["params"]] for group in groups]
        found = {}
        names = [name for group in names_in_order(shapes, asked) for name in group]
        for name, number, master in zip(names, numbers, flat_masters, strict=True):
            value = self._module[name] if master is None else master
            trained = Trained(Parts(shapes[name], torch.float32, (dense(value, f"'{name}'"),)))
            for key, kept in state.get(number, {}).items():
                if isinstance(kept, Tensor) and key != "step" and tuple(kept.shape) == shapes[name]:
                    trained.elements[key] = Parts(shapes[name], torch.float32, (dense(kept, f"{key} of '{name}'"),))
                else:
                    trained.rest[key] = kept
            found[name] = trained
        order = list(shapes)
        return {name: found[name] for name in sorted(found, key=order.index)}

    def _numbered_flat(self, masters: Sequence[Any], state: Mapping[Any, Any]) -> dict[str, Trained]:
        """Stage 0 with flat masters: of one group, which then has all parameters."""
        shapes = self._parameter_shapes()
        numel = sum(map(numel_of, shapes.values()))
        if len(masters) != 1 or dense(masters[0], "the masters").numel() != numel:
            raise CheckpointError(
                f"'{self._files.model[0]}' has flat masters of stage 0 in several param groups, or without frozen "
                "parameters, and does not say where a parameter is in them: save once in stage 1, 2 or 3, or leave "
                "the optimizer out with --weights-only"
            )
        return from_flat_groups([FlatGroup(shapes, [0] * len(shapes), [masters[0]], [state.get(0, {})])])

    def _parameter_shapes(self) -> dict[str, Shape]:
        buffers = {*self._model.get("buffer_names", []), *self._aliases}
        return {n: tuple(v.shape) for n, v in self._module.items() if isinstance(v, Tensor) and n not in buffers}

    def _model_tensors(self, trained: Mapping[str, Trained]) -> dict[Place, Parts]:
        """The tensors of the state dict, in its order."""
        frozen = self._frozen()
        found: dict[Place, Parts] = {}
        for name in [*self._module, *(n for n in (*trained, *frozen) if n not in self._module)]:
            if name in self._aliases:
                continue
            value = self._module.get(name)
            if value is not None and not isinstance(value, Tensor):
                self._notes.append(f"'{name}' in the model's state dict is no tensor, and is left out")
                continue
            found[Place(MODEL, name)] = self._model_tensor(name, value, trained.get(name), frozen)
        return found

    def _model_tensor(
        self, name: str, value: Tensor | None, trained: Trained | None, frozen: Mapping[str, Parts]
    ) -> Parts:
        if trained is None and name in frozen and (value is None or value.numel() == 0):
            return frozen[name]
        if trained is None:
            if value is None:
                raise CheckpointError(f"there is no value of '{name}'")
            return Parts(tuple(value.shape), value.dtype, (dense(value, f"'{name}'"),))
        dtype = torch.float32 if value is None else value.dtype
        if value is None or dtype == torch.float32 or tuple(value.shape) != trained.master.shape:
            if value is not None and value.numel() not in (0, numel_of(trained.master.shape)):
                raise CheckpointError(f"'{name}' has shape {tuple(value.shape)}, its master {trained.master.shape}")
            return Parts(trained.master.shape, dtype, trained.master.parts)
        return Parts(trained.master.shape, dtype, (dense(value, f"'{name}'"),))

    def _frozen(self) -> dict[str, Parts]:
        """Parameters that were not trained, where the ranks have slices of them."""
        shapes = self._model.get("frozen_param_shapes") or {}
        kept = [model.get("frozen_param_fragments") or {} for model in self._models]
        found = {}
        for name, shape in (_shapes([shapes], self._files.model[0])[0] if shapes else {}).items():
            values = [one[name] for one in kept if isinstance(one.get(name), Tensor)]
            if len(values) == len(kept):
                found[name] = fragments(shape, values[0].dtype, values, name)
        return found

    # -- small states

    def _small(self, trained: Mapping[str, Trained]) -> tuple[SavedState, dict[str, Any]]:
        model, notes = self._model, self._notes
        done = max(0, int(model.get("global_steps") or 0) - int(model.get("skipped_steps") or 0))
        applied = sections.applied_steps(trained, self._groups, done)
        step = sections.counters(model, self._scaler, applied)
        small: dict[str, Any] = {
            "step": to_plain(step, "step"),
            "accumulation": {"micro_steps": step["global_steps"], "micro_batches": 1},
            **dict.fromkeys(NOT_IN_FILES),
        }
        notes.append("the place in the data and random states begin anew: DeepSpeed does not save them")
        rank: dict[str, Any] = {}
        if self._weights_only:
            notes.append("what the optimizer keeps is left out: load_checkpoint(load_optimizer_states=False)")
        if not self._weights_only and trained:
            native = sections.is_adam(self._groups, trained)
            states = sections.optimizer_states(trained, native, applied)
            rank["optimizer_states"] = to_plain(states, "optimizer_states")
            # An elastic checkpoint has no param groups: those of the run stay.
            small["optimizer"] = sections.param_groups(self._groups, notes) if self._groups else None
        if isinstance(model.get("lr_scheduler"), Mapping):
            small["lr_scheduler"] = sections.schedule(model["lr_scheduler"], notes)
        for name in ("data_sampler", "random_ltd"):
            if model.get(name) is not None:
                notes.append(f"the state of '{name}' is left out: Partita has none")
        client = sections.client_state(model, notes)
        aliases = {alias: name for alias, name in self._aliases.items() if alias in self._module or not self._module}
        saved = SavedState(sections=small, ranks=[rank], client_state=client, aliases=aliases, parameters={})
        return saved, step

    def _facts(self, trained: Mapping[str, Trained]) -> dict[str, Any]:
        version = self._model.get("ds_version")
        return {
            "imported from": f"DeepSpeed {version}" if isinstance(version, str) else "DeepSpeed",
            "ranks": max(len(self._files.optimizer), len(self._models)),
            "parameters": sum(numel_of(one.master.shape) for one in trained.values()),
        }


def _file_tensor(path: Path, shape: Shape) -> Parts:
    """A file of a universal checkpoint: a tensor, or a dict that has it as "param"."""
    value = load_inert(path)
    value = value.get("param") if isinstance(value, Mapping) else value
    flat = dense(value, f"'{path}'")
    if flat.numel() != numel_of(shape):
        raise CheckpointError(f"'{path}' has {flat.numel():,} elements, and the parameter has the shape {shape}")
    return Parts(shape, torch.float32, (flat,))


def _mapping(value: Any, path: Path, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"'{path}' has no dict '{key}': it is not as DeepSpeed writes checkpoints")
    return value


def _shapes(groups: Any, path: Path) -> list[dict[str, Shape]]:
    """The shapes of parameters by name, checked."""
    if not isinstance(groups, list):
        raise CheckpointError(f"'{path}' has no 'param_shapes', so its parameters have no names")
    for group in groups:
        for name, shape in _mapping(group, path, "param_shapes").items():
            good = isinstance(shape, tuple | list) and all(type(n) is int and n >= 0 for n in shape)
            if not isinstance(name, str) or not good:
                raise CheckpointError(f"'{path}' has {ascii(shape)[:80]} as the shape of {ascii(name)[:80]}")
    return [{name: tuple(shape) for name, shape in group.items()} for group in groups]


def _shape_kept(state: Any) -> Shape | None:
    """The shape of a parameter for which an optimizer keeps this."""
    tensors = [v for k, v in (state or {}).items() if isinstance(v, Tensor) and k != "step" and v.dim()]
    return tuple(tensors[0].shape) if tensors else None
