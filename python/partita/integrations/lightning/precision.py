"""`PartitaPrecision`: backwards, clipping and steps of Lightning's loop, which are the engine's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer

from partita.integrations.lightning.settings import PRECISIONS

if TYPE_CHECKING:
    from partita import Engine

_OF_LIGHTNING = (Precision, MixedPrecision, HalfPrecision)
_CAST_TO = {"16-true": torch.float16, "bf16-true": torch.bfloat16}
_AUTOCAST_TO = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


class PartitaPrecision(Precision):
    """What `PartitaStrategy` makes of `Trainer(precision=...)`; nobody has to give one.

    "32-true", and "16-mixed" and "bf16-mixed" as in Lightning: autocast, over parameters in fp32. "16-true" and
    "bf16-true": the model and its floating-point inputs have this type, and the masters of the optimizer are in fp32.

    Args:
        precision: one of these.

    Attributes:
        clips_at: the norm at which the engine clips; 0: it does not.

    Raises:
        ValueError: it is another one.
    """

    def __init__(self, precision: str = "32-true") -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"PartitaStrategy: precision={precision!r}: it has {', '.join(map(repr, PRECISIONS))}")
        self.precision = precision
        self.clips_at = 0.0

    @classmethod
    def like(cls, plugin: Precision) -> PartitaPrecision:
        """The one for a plugin that Lightning has made of `Trainer(precision=...)`.

        Raises:
            ValueError: it is a plugin of the program's, whose work the engine would not do.
        """
        if isinstance(plugin, cls):
            return plugin
        if type(plugin) not in _OF_LIGHTNING:
            raise ValueError(
                f"PartitaStrategy with a {type(plugin).__name__}: precision is the engine's; give "
                'Trainer(precision="bf16-mixed"), say, or a section of the config such as "bf16"'
            )
        return cls(plugin.precision)

    def convert_input(self, data: Any) -> Any:
        """A batch, its floating-point tensors in the type of a 16-bit model."""
        dtype = _CAST_TO.get(self.precision)
        return data if dtype is None else HalfPrecision(self.precision).convert_input(data)

    def autocast(self, device: str) -> AbstractContextManager[Any]:
        """What the engine's forward runs under, for a training step that is not in the engine's forward."""
        dtype = _AUTOCAST_TO.get(self.precision)
        return nullcontext() if dtype is None else torch.autocast(device, dtype)

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, **kwargs: Any) -> None:
        """The engine's backward of a loss that Lightning has divided by the micro-batches of the step.

        A `backward()` that the module overrides runs in its place, with a loss that has the engine's scale.
        """
        engine = _engine_of(model)
        if is_overridden("backward", model, LightningModule):
            model.backward(engine.scale(tensor * engine.gradient_accumulation_steps()), **kwargs)
        else:
            engine.backward(tensor, scale_wrt_gas=False, **kwargs)

    def optimizer_step(self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:
        """The last micro-batch of a step, and the engine's update."""
        result = closure()
        self._after_closure(model, optimizer)
        _engine_of(model).step()
        return result

    def clip_gradients(self, optimizer: Optimizer, clip_val: Any = 0.0, gradient_clip_algorithm: Any = "norm") -> None:
        """Nothing, as the engine clips in its step.

        Raises:
            ValueError: the module's `configure_gradient_clipping` asks for something else.
        """
        if clip_val and (str(getattr(gradient_clip_algorithm, "value", gradient_clip_algorithm)), clip_val) != (
            "norm",
            self.clips_at,
        ):
            raise ValueError(
                f"clip_gradients({clip_val}, {gradient_clip_algorithm}): the engine clips at norm {self.clips_at:g} in "
                "its step; say the norm by Trainer(gradient_clip_val=), the same for all steps"
            )


def _engine_of(model: Any) -> Engine:
    engine: Engine = model.trainer.strategy.engine
    return engine
