"""`deepspeed.checkpointing`: functions whose activations are computed again in backward, and named random numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint as torch_checkpoint

from partita.compat.deepspeed._absent import absent_names

logger = logging.getLogger("partita")

_MODEL_PARALLEL_RNG = "model-parallel-rng"


@dataclass
class _Wishes:
    """What `configure()` was told: of the process, as in DeepSpeed."""

    is_configured: bool = False
    on_host: bool = False


_wishes = _Wishes()


def configure(
    mpu_: Any,
    deepspeed_config: Any = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Says how `checkpoint()` keeps inputs.

    Args:
        mpu_: None, or any: activations are whole on each rank.
        deepspeed_config: dict or path, whose `activation_checkpointing.cpu_checkpointing` counts.
        checkpoint_in_cpu: keep inputs in host memory; None: as the config says.
        partition_activations, contiguous_checkpointing, num_checkpoints, synchronize, profile: without effect, which
            is said if one of them asks for something.
    """
    section: Any = {}
    if deepspeed_config is not None:
        from partita.config import load_config  # with pydantic, which `import partita` leaves out

        section = load_config(deepspeed_config).activation_checkpointing
    from_config = getattr(section, "cpu_checkpointing", False)
    _wishes.on_host = bool(from_config if checkpoint_in_cpu is None else checkpoint_in_cpu)
    _wishes.is_configured = True
    asked = {
        "partition_activations": partition_activations,
        "contiguous_checkpointing": contiguous_checkpointing,
        "synchronize": synchronize,
        "profile": profile,
    }
    without_effect = [name for name, value in asked.items() if value]
    if without_effect:
        logger.info(f"checkpointing.configure(): {', '.join(without_effect)}: without effect here")


def is_configured() -> bool:
    """Whether `configure()` was called."""
    return _wishes.is_configured


def reset() -> None:
    """Nothing is kept between two steps here, so there is nothing to free."""


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls the function; its activations are computed again in backward. Random numbers are the same then."""
    if not _wishes.on_host:
        return torch_checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return torch_checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)


non_reentrant_checkpoint = checkpoint


def set_num_layers(nlayers: int) -> None:
    """Accepted; nothing here depends on the number of layers."""


def partition_activations_in_checkpoint(partition_activation: bool) -> None:
    """Accepted; activations are whole on each rank."""


class CudaRNGStatesTracker:
    """Random generators by name, of the GPU if there is one, else of the CPU: `fork()` draws from one of them and
    leaves the program's as it was."""

    def __init__(self) -> None:
        self._states: dict[str, Tensor] = {}
        self._seeds: set[int] = set()

    def reset(self) -> None:
        """Forgets all of them."""
        self._states, self._seeds = {}, set()

    def get_states(self) -> dict[str, Tensor]:
        """A copy of the states by name."""
        return dict(self._states)

    def set_states(self, states: dict[str, Tensor]) -> None:
        """Goes on from states that `get_states()` gave."""
        self._states = dict(states)

    def add(self, name: str, seed: int) -> None:
        """A new generator.

        Raises:
            ValueError: there is one of that name or seed.
        """
        if seed in self._seeds or name in self._states:
            raise ValueError(f"there is a random generator of the name '{name}' or of the seed {seed} already")
        self._seeds.add(seed)
        with _generator_kept():
            _seed(seed)
            self._states[name] = _get_state()

    @contextmanager
    def fork(self, name: str = _MODEL_PARALLEL_RNG) -> Iterator[None]:
        """In this block random numbers come from a generator.

        Raises:
            KeyError: there is none of that name.
        """
        if name not in self._states:
            raise KeyError(f"there is no random generator '{name}': add() it first")
        with _generator_kept():
            _set_state(self._states[name])
            try:
                yield
            finally:
                self._states[name] = _get_state()


_tracker = CudaRNGStatesTracker()


def get_cuda_rng_tracker() -> CudaRNGStatesTracker:
    """The one of the process."""
    return _tracker


def model_parallel_cuda_manual_seed(seed: int) -> None:
    """Seeds the program's generator, and that of `get_cuda_rng_tracker().fork()` with `seed + 2718`.

    There is one tensor-parallel rank, so all ranks get the same seeds.
    """
    _tracker.reset()
    _seed(seed)
    _tracker.add(_MODEL_PARALLEL_RNG, seed + 2718)


model_parallel_reconfigure_tp_seed = model_parallel_cuda_manual_seed


def _seed(seed: int) -> None:
    if torch.cuda.is_available():
        torch.cuda.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def _get_state() -> Tensor:
    return torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.get_rng_state()


def _set_state(state: Tensor) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state)
    else:
        torch.set_rng_state(state)


@contextmanager
def _generator_kept() -> Iterator[None]:
    before = _get_state()
    try:
        yield
    finally:
        _set_state(before)


__getattr__ = absent_names(__name__)
