"""What DeepSpeed counts and remembers, in the words of a training state. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from partita.checkpoint.deepspeed_files import Inert
from partita.checkpoint.deepspeed_states import Trained
from partita.model import to_plain

# What DeepSpeed puts beside the program's own state into the same dict.
_OWN = {
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
    "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "skipped_steps", "global_steps",
    "global_samples", "dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions", "ds_config", "ds_version",
    "universal_checkpoint_info", "ds_autoep_layers", "autoep_layers", "num_experts", "csr_tensor_module_names",
    "sparse_tensor_module_names",
}  # fmt: skip
# Of a param group: how an optimizer computes on its machine, or what it counts. It is no part of the run.
_NOT_OF_A_RUN = {"params", "step", "foreach", "fused", "capturable", "differentiable"}
_ADAM_KEPT = {"exp_avg", "exp_avg_sq"}
_ADAM_ONLY = {"amsgrad", "bias_correction"}  # RAdam and others keep the same, and have neither
_NOT_NATIVE = ("amsgrad", "maximize", "max_coeff")


def client_state(model: Mapping[str, Any], notes: list[str]) -> Any:
    """The program's own state, as state.json has it. What cannot be there is left out, and noted."""
    return _plain_items({key: value for key, value in model.items() if key not in _OWN}, "client_state", notes)


def schedule(state: Mapping[str, Any], notes: list[str]) -> Any:
    """The state of a schedule of learning rates; those of DeepSpeed's names take it as it is, and so do torch's."""
    return _plain_items(state, "lr_scheduler", notes)


def _plain_items(values: Mapping[str, Any], where: str, notes: list[str]) -> dict[str, Any]:
    plain = {}
    for key, value in values.items():
        if not isinstance(key, str):
            notes.append(f"{where}[{key!r}] is left out: its name is no text")
            continue
        try:
            plain[key] = to_plain(value, f"{where}['{key}']")
        except (TypeError, ValueError) as error:
            notes.append(f"{where}['{key}'] is left out: {error}")
    return plain


def param_groups(groups: Sequence[Mapping[str, Any]], notes: list[str]) -> dict[str, Any]:
    """The section of the optimizer's hyper-parameters."""
    kept = [{key: value for key, value in group.items() if key not in _NOT_OF_A_RUN} for group in groups]
    return {"groups": [_plain_items(group, f"param_groups[{i}]", notes) for i, group in enumerate(kept)]}


def is_adam(groups: Sequence[Mapping[str, Any]], trained: Mapping[str, Trained]) -> bool:
    """Whether Partita updates such an optimizer natively: Adam or AdamW, without what the native one does not have."""
    if any(one.elements.keys() != _ADAM_KEPT for one in trained.values()):
        return False
    return all(_ADAM_ONLY & group.keys() and not any(group.get(key) for key in _NOT_NATIVE) for group in groups)


def optimizer_states(trained: Mapping[str, Trained], native: bool, applied: int) -> dict[str, Any]:
    """The section of what the optimizer keeps beside its values per element.

    Args:
        applied: the updates that the run had made.
    """
    if native:
        steps = {name: _number(one.rest.get("step"), applied) for name, one in trained.items()}
        waited = {name: applied - step for name, step in sorted(steps.items()) if step != applied}
        return {"optimizer": "Adam (from DeepSpeed)", **({"waited": waited} if waited else {})}
    parameters = {
        name: {
            "elements": {key: (str(parts.dtype), parts.shape) for key, parts in one.elements.items()},
            "rest": {key: value for key, value in one.rest.items() if not isinstance(value, Inert)},
            "beside": [],
        }
        for name, one in trained.items()
        if one.elements or one.rest
    }
    return {"parameters": parameters, "others": {}}


def applied_steps(trained: Mapping[str, Trained], groups: Sequence[Mapping[str, Any]], otherwise: int) -> int:
    """The updates that the optimizer has made, by its own count. It can be ahead of the run: in 16 bits, DeepSpeed's
    stage 0 steps once when it is made.

    Args:
        otherwise: where the optimizer does not count.
    """
    counts = [one.rest.get("step") for one in trained.values()] + [group.get("step") for group in groups]
    steps = [_number(count, -1) for count in counts if count is not None]
    return max(steps, default=-1) if max(steps, default=-1) >= 0 else otherwise


def counters(model: Mapping[str, Any], scaler: Any, applied: int) -> dict[str, Any]:
    """The section of the steps, with the loss scale.

    Args:
        scaler: DeepSpeed's, an object, or in stage 0 a dict; None: there is none.
        applied: see `applied_steps`.
    """
    dynamic, scale = _loss_scale(model, scaler)
    skipped = _number(model.get("skipped_steps"), 0)
    last = {"grad_norm": 0.0, "grad_scale": 1.0, "skip": bool(scale["consecutive_skips"]), "step": applied}
    return {
        "global_steps": _number(model.get("global_steps"), 0),
        "global_samples": _number(model.get("global_samples"), 0),
        "loss_scale": {**scale, "applied_steps": applied, "skipped_steps": skipped, "at_minimum": False},
        "scales": dynamic,
        "last_step": last,
    }


def _loss_scale(model: Mapping[str, Any], scaler: Any) -> tuple[bool, dict[str, Any]]:
    """Whether the loss scale moves, and where it is.

    DeepSpeed counts all steps, and knows the one of the last overflow. `good_steps` counts from there, and begins anew
    at each growth.
    """

    def of(name: str) -> Any:
        return scaler.get(name) if isinstance(scaler, Mapping) else scaler.attribute(name)

    fp16 = _fp16_config(model)
    hysteresis = _number(fp16.get("hysteresis"), 2)
    if scaler is None or not (of("dynamic") or of("dynamic_loss_scale")):
        scale = 1.0 if scaler is None else _real(of("cur_scale"))
        return False, {"scale": scale, "good_steps": 0, "hysteresis": hysteresis, "consecutive_skips": 0}
    window = max(1, _number(of("scale_window"), 1000))
    good = max(0, _number(of("cur_iter"), 0) - _number(of("last_overflow_iter"), -1) - 1)
    overflowed = _number(of("last_overflow_iter"), -1) >= 0 and good == 0
    return True, {
        "scale": _real(of("cur_scale")),
        "good_steps": (good - 1) % window + 1 if good else 0,
        "hysteresis": _number(of("cur_hysteresis"), hysteresis),
        "consecutive_skips": int(overflowed),
    }


def _fp16_config(model: Mapping[str, Any]) -> Mapping[str, Any]:
    config = model.get("ds_config")
    fp16 = config.get("fp16") if isinstance(config, Mapping) else None
    return fp16 if isinstance(fp16, Mapping) else {}


def _number(value: Any, otherwise: int) -> int:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return int(value) if isinstance(value, int | float) and abs(value) < 2**53 else otherwise


def _real(value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return float(value) if isinstance(value, int | float) and value > 0 else 1.0
