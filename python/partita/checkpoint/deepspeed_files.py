"""DeepSpeed's checkpoint files: which there are, and their content, of which nothing is ever run."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from partita.checkpoint.disk import kind_of
from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.strict_json import shown

_MODEL = re.compile(r"mp_rank_(?P<mp>\d+)_model_states\.pt", re.ASCII)
_MODEL_PART = re.compile(r"zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<mp>\d+)_model_states\.pt", re.ASCII)
_OPTIMIZER = re.compile(
    r"(?P<kind>(bf16_|fp16_)?)zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt", re.ASCII
)
_OF_PARTS = re.compile(r"(layer_|expert_|expp_rank_).*\.pt", re.ASCII)
_LATEST = ("latest", "latest_universal")
_MAX_LATEST_BYTES = 4096
UNIVERSAL = "zero"  # the folder of a universal checkpoint that has a folder for each parameter
# Of objects of these packages nothing is needed, so they may be there. Another object may be no checkpoint's at all.
_HARMLESS = ("deepspeed", "megatron", "numpy", "argparse")
_MEMBER = "builtins.getattr"  # by which some versions of Python save a member of an Enum; inert like the rest
_READ_BYTES = 1 << 20
# What torch's loader says of bytes that it did not write.
_DAMAGED = (RuntimeError, ValueError, TypeError, EOFError, LookupError, AttributeError)

_TENSOR_PARALLEL = (
    "was saved by ranks that share tensors or layers (tensor, pipeline or expert parallelism): convert it with "
    "DeepSpeed's ds_to_universal.py, which puts them together, and import that"
)


@dataclass(frozen=True)
class DeepSpeedFiles:
    """The files of one checkpoint, by rank where each rank has one.

    folder: in which they are. model: one file, or in stage 3 one of each rank. optimizer: of each rank, or none.
    parameters: name -> folder, of a universal checkpoint.
    """

    folder: Path
    model: list[Path]
    optimizer: list[Path] = field(default_factory=list)
    parameters: dict[str, Path] = field(default_factory=dict)

    @property
    def all(self) -> list[Path]:
        """Every file that is read."""
        universal = [path for folder in self.parameters.values() for path in sorted(folder.glob("*.pt"))]
        extra = [self.common] if self.parameters and kind_of(self.common) is not None else []
        return [*self.model, *self.optimizer, *extra, *universal]

    @property
    def common(self) -> Path:
        """What the parameters of a universal checkpoint have in common."""
        return self.folder / UNIVERSAL / "optimizer_state.pt"


def find_deepspeed(source: Path, tag: str | None) -> DeepSpeedFiles:
    """The files of a checkpoint that DeepSpeed saved.

    Args:
        source: the folder in which checkpoints were saved, or, without `tag`, the folder of the checkpoint.
        tag: None: what `source/latest` names (of a universal one: `source/latest_universal`).

    Raises:
        CheckpointError: there is none, a file of it is missing, or it is of a kind that is not read; says what to do.
        OSError: the folder cannot be read.
    """
    if not source.is_dir():
        raise CheckpointError(f"'{source}' is no folder")
    folder = source if tag is None and _has_files(source) else source / (_latest(source) if tag is None else tag)
    if not folder.is_dir():
        raise CheckpointError(f"'{folder}' is no folder: --tag names one in '{source}'")
    names = sorted(os.listdir(folder))
    parts = next((name for name in names if _OF_PARTS.fullmatch(name)), None)
    others = next((name for name in names if _mp_rank(name) not in (None, 0)), None)
    if parts is not None or others is not None:
        raise CheckpointError(f"'{folder}' has '{parts or others}', so it {_TENSOR_PARALLEL}")
    if (folder / UNIVERSAL).is_dir():
        return DeepSpeedFiles(folder, _model_files(folder, names), parameters=_parameter_folders(folder / UNIVERSAL))
    return DeepSpeedFiles(folder, _model_files(folder, names), _optimizer_files(folder, names))


def _has_files(folder: Path) -> bool:
    return any(_MODEL.fullmatch(name) or _MODEL_PART.fullmatch(name) for name in os.listdir(folder))


def _latest(source: Path) -> str:
    for name in _LATEST:
        if kind_of(source / name) is not None:
            with open(source / name, "rb") as file:
                text = file.read(_MAX_LATEST_BYTES).decode("utf-8", "replace").strip()
            if not text or "/" in text or "\0" in text or text in (".", ".."):
                raise CheckpointError(f"'{source / name}' names {shown(text)}, which is no folder: give --tag")
            return text
    raise CheckpointError(
        f"'{source}' has neither a file 'latest' nor DeepSpeed's *_model_states.pt: give the folder in which "
        "checkpoints were saved, and --tag for one that 'latest' does not name"
    )


def _mp_rank(name: str) -> int | None:
    found = _MODEL.fullmatch(name) or _MODEL_PART.fullmatch(name) or _OPTIMIZER.fullmatch(name)
    return int(found["mp"]) if found else None


def _model_files(folder: Path, names: Sequence[str]) -> list[Path]:
    whole = [name for name in names if _MODEL.fullmatch(name)]
    if whole:
        return [folder / whole[0]]
    parts = {int(found["rank"]): name for name in names if (found := _MODEL_PART.fullmatch(name))}
    if not parts:
        raise CheckpointError(f"'{folder}' has no *_model_states.pt: it is no checkpoint of DeepSpeed's")
    return _by_rank(folder, parts)


def _optimizer_files(folder: Path, names: Sequence[str]) -> list[Path]:
    found = [match for name in names if (match := _OPTIMIZER.fullmatch(name))]
    kinds = sorted({match["kind"] for match in found})
    if len(kinds) > 1:
        raise CheckpointError(
            f"'{folder}' has optimizer states of two runs ('{found[0][0]}' and '{found[-1][0]}'): move those of the "
            "other run away"
        )
    return _by_rank(folder, {int(match["rank"]): match[0] for match in found})


def _by_rank(folder: Path, names: dict[int, str]) -> list[Path]:
    """In the order of the ranks, which is not that of the names."""
    missing = next((rank for rank in range(len(names)) if rank not in names), None)
    if missing is not None:
        like = names[max(names)].replace(f"rank_{max(names)}_", f"rank_{missing}_", 1)
        raise CheckpointError(f"'{folder}' has no '{like}', but a file of rank {max(names)}")
    return [folder / names[rank] for rank in range(len(names))]


def _parameter_folders(folder: Path) -> dict[str, Path]:
    return {name: folder / name for name in sorted(os.listdir(folder)) if kind_of(folder / name) == "a folder"}


class Inert:
    """Stands for an object of a class that is not loaded: what it was made of, and nothing that could run.

    Attributes:
        arguments: of its making.
        state: its attributes, if it had any.
    """

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def attribute(self, name: str) -> Any:
        """An attribute of the object; None: it had none of this name."""
        return self.state.get(name) if isinstance(self.state, dict) else None


def load_dict(path: Path, any_objects: bool = False) -> dict[str, Any]:
    """The dict in a file, see `load_inert`.

    Raises:
        CheckpointError: as there, or the file has something else.
        OSError: it cannot be read.
    """
    content = load_inert(path, any_objects)
    if not isinstance(content, dict):
        raise CheckpointError(f"'{path}' has a {type(content).__name__} and no dict: it is not DeepSpeed's")
    return content


def load_inert(path: Path, any_objects: bool = False) -> Any:
    """The content of a file of torch.save(). Tensors are read when they are used, and are views of the file.

    Objects become `Inert`, which torch's `weights_only` loader is told to take for their classes. It calls nothing else
    but torch's own functions that make tensors.

    Args:
        any_objects: of any class; False: of DeepSpeed's, and of a few that training programs save.

    Raises:
        CheckpointError: the file is damaged, or has objects of other classes; names it.
        OSError: it cannot be read.
    """
    if kind_of(path) != "a file":
        raise CheckpointError(f"'{path}' is {kind_of(path) or 'missing'}, but is to be a file")
    try:
        with _no_safe_globals():
            names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
            others = [name for name in names if name.partition(".")[0] not in _HARMLESS and name != _MEMBER]
            if others and not any_objects:
                raise CheckpointError(
                    f"'{path}' has {shown(others[0])}, which is neither a tensor nor anything of DeepSpeed's. Nothing "
                    "of it was run. If the program that saved it is known, --any-objects leaves such objects out"
                )
            inert: list[Any] = [(type(name.rpartition(".")[2], (Inert,), {}), name) for name in names]
            with torch.serialization.safe_globals(inert):
                return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error}") from None
    except (
        RuntimeError,
        ValueError,
        TypeError,
        EOFError,
        LookupError,
        AttributeError,
        pickle.UnpicklingError,
    ) as error:
        raise CheckpointError(f"'{path}' is no file of torch.save(), or is damaged: {_first_line(error)}") from None


@contextmanager
def _no_safe_globals() -> Iterator[None]:
    """What a program has told torch to trust is not trusted here."""
    given = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(given)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def check_sums(path: Path) -> Iterator[int]:
    """Reads a file of torch.save() and compares it with its check sums; gives the bytes of each part that was read.

    Raises:
        CheckpointError: it is damaged; names what in it.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(member.CRC for member in members):  # torch can be told to leave them out
                for member in members:
                    with archive.open(member) as file:
                        while part := file.read(_READ_BYTES):
                            yield len(part)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError) as error:
        raise CheckpointError(f"'{path}' is no file of torch.save(), or is damaged: {_first_line(error)}") from None
