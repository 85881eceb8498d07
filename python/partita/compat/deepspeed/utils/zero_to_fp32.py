"""The float32 weights of a checkpoint without an engine: of Partita's, and of those that DeepSpeed saved."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from partita.compat.deepspeed._absent import absent_names

FilePath = str | os.PathLike[str]


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: FilePath,
    tag: str | int | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> dict[str, Tensor]:
    """The state dict of a checkpoint, on the CPU; what was trained is float32, whatever the model computed in.

    Args:
        tag: None: the one that `checkpoint_dir/latest` names.
        exclude_frozen_parameters: False; a checkpoint has the whole model.
        lazy_mode: False; tensors are read at once.

    Raises:
        ValueError: `exclude_frozen_parameters` or `lazy_mode` is asked for.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    if exclude_frozen_parameters or lazy_mode:
        raise ValueError("exclude_frozen_parameters and lazy_mode are not here: drop tensors from the result")
    from safetensors.torch import load_file

    with _exported(checkpoint_dir, tag) as path:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}


def convert_zero_checkpoint_to_state_dict(
    checkpoint_dir: FilePath,
    output_dir: FilePath,
    dtype: torch.dtype | None = torch.float32,
    max_shard_size: str = "5GB",
    safe_serialization: bool = True,
    tag: str | int | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Writes a checkpoint's state dict into safetensors files, as `partita checkpoint export` does.

    Args:
        output_dir: a folder, which gets model.safetensors, or files of at most 5 GB and an index; or a path that ends
            in ".safetensors".
        dtype: of the floating-point tensors; None: as the model computed.
        max_shard_size: "5GB"; other sizes are refused.
        safe_serialization: True; no pickle is written.

    Raises:
        ValueError: something else is asked for.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    if max_shard_size != "5GB" or not safe_serialization or exclude_frozen_parameters:
        raise ValueError(
            "a checkpoint is converted to whole models in safetensors files of at most 5GB: leave max_shard_size and "
            "exclude_frozen_parameters out, and pass safe_serialization=True"
        )
    with _own_checkpoint(checkpoint_dir, tag) as (folder, own_tag):
        _export(folder, own_tag, Path(output_dir), dtype)


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: FilePath,
    output_dir: FilePath,
    max_shard_size: str = "5GB",
    safe_serialization: bool = True,
    tag: str | int | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """The same in float32."""
    convert_zero_checkpoint_to_state_dict(
        checkpoint_dir, output_dir, torch.float32, max_shard_size, safe_serialization, tag, exclude_frozen_parameters
    )


def load_state_dict_from_zero_checkpoint(
    model: nn.Module, checkpoint_dir: FilePath, tag: str | int | None = None
) -> nn.Module:
    """The model on the CPU with the weights of a checkpoint; no engine has it, or can go on with it.

    Raises:
        RuntimeError: shapes differ. Names may.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    model = model.cpu()
    model.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag), strict=False)
    return model


@contextmanager
def _exported(folder: FilePath, tag: str | int | None) -> Iterator[Path]:
    with TemporaryDirectory() as made, _own_checkpoint(folder, tag) as (own, own_tag):
        path = Path(made) / "weights.safetensors"
        _export(own, own_tag, path, torch.float32)
        yield path


@contextmanager
def _own_checkpoint(folder: FilePath, tag: str | int | None) -> Iterator[tuple[Path, str | None]]:
    """The folder and tag of a checkpoint of Partita's: that one, or what one of DeepSpeed's becomes."""
    from partita.checkpoint import DeepSpeedImport

    place, name = Path(folder), None if tag is None else str(tag)
    if _is_deepspeeds(place, name):
        with TemporaryDirectory() as made:
            importing = DeepSpeedImport(place, Path(made), name, weights_only=True, any_objects=True)
            for _ in importing.run():
                pass
            yield Path(made), importing.path.name
    else:
        yield place, name


def _is_deepspeeds(folder: Path, tag: str | None) -> bool:
    latest = folder / "latest"
    name = tag if tag is not None else latest.read_text().strip() if latest.is_file() else ""
    return any((folder / name).glob("*_model_states.pt"))


def _export(folder: Path, tag: str | None, path: Path, dtype: torch.dtype | None) -> None:
    from partita.checkpoint import export, find

    for _ in export(find(folder, tag), path, dtype):
        pass


__getattr__ = absent_names(__name__)
