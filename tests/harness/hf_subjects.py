"""Runs of Hugging Face's Trainer on tiny models: by itself, or over Partita, on the ranks of a job."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

VOCABULARY = 51
# A word of the sizes is one that no unit divides: the last shard is shorter.
LLAMA: dict[str, Any] = {
    "hidden_size": 20,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {
    "n_embd": 20,
    "n_layer": 2,
    "n_head": 2,
    "vocab_size": VOCABULARY,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
T5: dict[str, Any] = {
    "d_model": 20,
    "d_ff": 36,
    "d_kv": 10,
    "num_heads": 2,
    "num_layers": 2,
    "vocab_size": VOCABULARY,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
AUTO = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
SIZES = {"llama": LLAMA, "gpt2": GPT2, "t5": T5}


def model_of(kind: str, **changes: Any) -> Any:
    """A tiny model with random weights, the same on every call."""
    import transformers

    torch.manual_seed(0)
    auto = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(kind, **SIZES[kind] | special | changes)
    return auto.from_config(config)


def read_back(folder: Path | str) -> Any:
    """A plain model of what is saved there, whatever has trained before."""
    import transformers

    build_plainly()
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def build_plainly() -> None:
    """Models are no longer built partitioned, as they are where a config of stage 3 by the alias is alive."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def texts(count: int, seed: int = 7, lengths: tuple[int, int] = (3, 17)) -> list[dict[str, list[int]]]:
    """Texts of very different lengths."""
    source = random.Random(seed)
    rows = [[source.randrange(3, VOCABULARY) for _ in range(source.randrange(*lengths))] for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


def tokenizer() -> Any:
    """One token for each of 48 letters, and three special ones."""
    import tokenizers
    import transformers

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    words = [*special.values(), *(chr(48 + i) for i in range(VOCABULARY - 3))]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def pad(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A batch: token 0 after the end of a text, label -100."""
    batch: dict[str, Tensor] = {}
    for name, filler in (("input_ids", 0), ("labels", -100)):
        longest = max(len(row[name]) for row in rows)
        batch[name] = torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in rows])
    batch["attention_mask"] = batch["input_ids"].ne(0).long()
    return batch


@contextmanager
def job() -> Iterator[None]:
    """What torchrun tells programs, for the process group that there is; Accelerate begins anew."""
    names = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank()}
    names |= {"WORLD_SIZE": dist.get_world_size(), "LOCAL_WORLD_SIZE": dist.get_world_size()}
    told = {name: str(value) for name, value in names.items()} if dist.get_world_size() > 1 else {}
    told |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    before = dict(os.environ)
    os.environ.update(told)
    _begin_anew()
    try:
        yield
    finally:
        _begin_anew()
        for name in told:
            os.environ.pop(name) if name not in before else os.environ.update({name: before[name]})


def _begin_anew() -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@dataclass(frozen=True)
class Subject:
    """What trains: "plain" is the library alone; "partita" is its class with the mixin before it; "alias" is the class
    itself with a config of DeepSpeed's, in a process in which DeepSpeed is Partita."""

    kind: str = "plain"
    stage: int = 0
    transport: str = "shared_memory"
    zero: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.kind if self.kind == "plain" else f"{self.kind}-{self.stage}-{self.transport}"

    @property
    def config(self) -> dict[str, Any]:
        """Of the engine. Small thresholds: nothing of a tiny model stays whole in stage 3."""
        zero = {"stage": self.stage, "reduce_bucket_size": 3000, "stage3_param_persistence_threshold": 30}
        if self.kind == "alias":
            zero["stage3_gather_16bit_weights_on_model_save"] = True
        return {
            "zero_optimization": zero | self.zero,
            "comm": {"transport": self.transport, "timeout_seconds": 30},
            "steps_per_print": 0,
        }

    def class_of(self, base: type) -> type:
        """The trainer's class."""
        if self.kind != "partita":
            return base
        from partita.integrations.huggingface import PartitaMixin

        return type(f"Partita{base.__name__}", (PartitaMixin, base), {})

    def trainer(self, base: type, model: nn.Module, arguments: Any, **given: Any) -> Any:
        """`base(model, arguments, ...)`, or the same over Partita."""
        config = {"partita_config": self.config} if self.kind == "partita" else {}
        if self.kind == "alias":
            arguments = replace(arguments, deepspeed=self.config | dict.fromkeys(AUTO, "auto"))
        return self.class_of(base)(model=model, args=arguments, **config, **given)


SUBJECTS = [Subject("partita", stage) for stage in (0, 1, 2, 3)] + [Subject("partita", 3, "torch")]


ALIASED = [replace(subject, kind="alias") for subject in SUBJECTS]


def on_ranks(*world_sizes: int, quick: bool = False, alias: bool = False) -> pytest.MarkDecorator:
    """Cases `world_size, subject` of a test; slow ones, but for stage 3 on two ranks if that is quick."""
    subjects = SUBJECTS + ALIASED if alias else SUBJECTS
    cases = [(world_size, subject) for world_size in world_sizes for subject in subjects]
    return pytest.mark.parametrize(
        "world_size, subject",
        [
            pytest.param(*case, id=f"{case[0]}-{case[1]}", marks=() if quick and case == QUICK else pytest.mark.slow)
            for case in cases
        ],
    )


QUICK = (2, Subject("partita", 3))


def arguments(folder: Path | str, kind: str | type | None = None, **changes: Any) -> Any:
    """TrainingArguments of a short run on CPUs: SGD, which shows the scale of gradients, without shuffling."""
    import transformers

    given: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "num_train_epochs": 1,
        "learning_rate": 0.05,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 5,
    }
    make = getattr(transformers, kind or "TrainingArguments") if not isinstance(kind, type) else kind
    return make(**given | changes)


def logged(trainer: Any, *names: str) -> list[Any]:
    """The values that the trainer logged under these names, as floats; a tuple for several names."""
    rows = [row for row in trainer.state.log_history if all(name in row for name in names)]
    return [row[names[0]] if len(names) == 1 else tuple(row[name] for name in names) for row in rows]


def whole_weights(trainer: Any) -> dict[str, Tensor]:
    """Copies of the model's weights on every rank; a collective in stage 3."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if dist.get_rank() > 0 or state is None:
        state = {}
    found = [{name: value.detach().clone() for name, value in state.items()}]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(found, src=0)
    return found[0]


def close(actual: Any, expected: Any, relative: float = 2e-5, absolute: float = 1e-7) -> None:
    """Asserts that two lists of numbers are the same to rounding."""
    np.testing.assert_allclose(np.array(actual, float), np.array(expected, float), rtol=relative, atol=absolute)


def close_weights(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    """Asserts that two models have the same weights to rounding."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name].float(), value.float(), rtol=1e-5, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def activate_alias() -> None:
    """On the ranks of a pool that has run nothing yet: DeepSpeed is Partita from now on."""
    from partita.compat import deepspeed

    deepspeed.activate()
