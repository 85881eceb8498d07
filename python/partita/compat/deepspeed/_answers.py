"""What an engine answers about its config, under DeepSpeed's names."""

from __future__ import annotations

from typing import Any

from partita.config import Config


class ConfigAnswers:
    """Calls of DeepSpeed's engine that read the config.

    Attributes:
        config: as the program wrote it.
    """

    config: dict[str, Any]

    def _settings(self) -> Config:
        raise NotImplementedError

    def zero_optimization(self) -> bool:
        """Whether anything is partitioned."""
        return self._settings().zero_optimization.stage > 0

    def zero_optimization_stage(self) -> int:
        """0 to 3."""
        return self._settings().zero_optimization.stage

    def zero_optimization_partition_gradients(self) -> bool:
        """Stages 2 and 3."""
        return self._settings().zero_optimization.stage >= 2

    def zero_optimization_partition_weights(self) -> bool:
        """Stage 3."""
        return self._settings().zero_optimization.stage >= 3

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        """Whether the config asks for whole weights when a model is saved in stage 3."""
        zero = self.config.get("zero_optimization")
        names = ("", "stage3_")
        return isinstance(zero, dict) and any(
            bool(zero.get(f"{prefix}gather_{kind}_weights_on_model_save"))
            for prefix in names
            for kind in ("16bit", "fp16")
        )

    def fp16_enabled(self) -> bool:
        """Whether the model is in float16."""
        return self._settings().fp16.enabled

    def bfloat16_enabled(self) -> bool:
        """Whether the model is in bfloat16."""
        return self._settings().bf16.enabled

    def gradient_clipping(self) -> float:
        """The largest norm of all gradients together; 0: they are not clipped."""
        return self._settings().gradient_clipping

    def steps_per_print(self) -> int | None:
        """Steps between two progress lines; None: there are none."""
        return self._settings().steps_per_print

    def optimizer_name(self) -> str | None:
        """The type of the config's optimizer."""
        chosen = self._settings().optimizer
        return None if chosen is None else chosen.type

    def optimizer_params(self) -> dict[str, Any] | None:
        """The parameters of the config's optimizer."""
        chosen = self._settings().optimizer
        return None if chosen is None else dict(chosen.params)

    def scheduler_name(self) -> str | None:
        """The type of the config's schedule."""
        chosen = self._settings().scheduler
        return None if chosen is None else chosen.type

    def scheduler_params(self) -> dict[str, Any] | None:
        """The parameters of the config's schedule."""
        chosen = self._settings().scheduler
        return None if chosen is None else dict(chosen.params)
