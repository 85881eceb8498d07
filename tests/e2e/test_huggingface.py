"""Hugging Face models in stage 3: through the unchanged calls, with the bits of stage 0."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import inside
import partita
import pytest
import torch
from partita.zero import GatheredParameters
from safetensors.torch import load_file
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

TRANSPORTS = ("shared_memory", "torch")
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 20, "n_layer": 2, "n_head": 2, "vocab_size": 51, "n_positions": 32},
    "llama": {
        "hidden_size": 20,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 51,
        "max_position_embeddings": 32,
    },
}
GPT2_TARGETS = ["c_attn"]


def build(kind: str) -> Any:
    """A tiny model with random weights, the same on every call."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES[kind], bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return transformers.AutoModelForCausalLM.from_config(config)


def config_for(stage: int, over: str, **changes: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 3000, "stage3_param_persistence_threshold": 30},
        "comm": {"transport": over, "timeout_seconds": 20},
        "steps_per_print": 0,
        **changes,
    }


def tokens_of(step: int, rank: int) -> Tensor:
    return torch.randint(1, 51, (2, 9), generator=torch.Generator().manual_seed(10 * step + rank))


Between = Callable[[partita.Engine], Any]


def train(
    model: Any, config: dict[str, Any], between: Between | None = None, steps: int = 3
) -> tuple[list[Any], dict[str, Tensor]]:
    """Losses, and what `between` returned; the final weights."""
    engine, *_ = partita.initialize(model, config=config)
    engine.train()
    seen: list[Any] = []
    torch.manual_seed(3 + engine.global_rank)  # of dropout
    for step in range(steps):
        for i in range(engine.gradient_accumulation_steps()):
            ids = tokens_of(2 * step + i, engine.global_rank)
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            seen.append(loss.item())
        if between is not None:
            seen.append(between(engine))
    weights = engine.module_state_dict()
    engine.destroy()
    return seen, weights


def assert_same(actual: tuple[list[Any], dict[str, Tensor]], expected: tuple[list[Any], dict[str, Tensor]]) -> None:
    assert actual[0] == expected[0]
    assert_same_weights(actual[1], expected[1])


def assert_same_weights(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def _trains(kind: str, over: str) -> None:
    for precision in ({}, {"bf16": {"enabled": True}}):
        expected = train(build(kind), config_for(0, over, **precision))
        assert_same(train(build(kind), config_for(3, over, **precision)), expected)
        assert not any(
            torch.equal(expected[1][name].float(), p) for name, p in build(kind).named_parameters() if p.dim() > 1
        )


@pytest.mark.parametrize("over", TRANSPORTS)
@pytest.mark.parametrize("kind", SIZES)
def test_it_trains_in_stage_3_with_the_bits_of_stage_0(ranks, kind, over):
    ranks(2).run(_trains, kind, over)


# -- generate


def generate(engine: partita.Engine) -> list[list[int]]:
    """From another prompt, and to another length, on every rank."""
    prompt = tokens_of(99, engine.global_rank)[:1, : 3 + engine.global_rank]
    length = 5 + 3 * engine.global_rank
    engine.eval()
    out = engine.module.generate(prompt, max_new_tokens=length, min_new_tokens=length, do_sample=False)
    engine.train()
    return out.tolist()  # type: ignore[no-any-return]


def generate_gathered(engine: partita.Engine) -> list[list[int]]:
    with GatheredParameters(engine.module.parameters()):
        return generate(engine)


def _generates(kind: str, over: str) -> None:
    expected = train(build(kind), config_for(0, over), generate)
    assert_same(train(build(kind), config_for(3, over), generate_gathered), expected)
    if over == "shared_memory":
        assert_same(train(build(kind), config_for(3, over), generate), expected)


@pytest.mark.parametrize("over", TRANSPORTS)
@pytest.mark.parametrize("kind", SIZES)
def test_it_generates_between_steps(ranks, kind, over):
    """S2, S5: ranks generate texts of different lengths; gathered as a whole, or where they share memory as it is."""
    ranks(2).run(_generates, kind, over)


# -- checkpointing of activations


def _checkpoints(kind: str, over: str) -> None:
    """Against the same in stage 0: with checkpointing, GPT-2 has other bits in plain torch, too."""
    for reentrant in (False, True):
        models = [build(kind), build(kind)]
        for model in models:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        assert_same(train(models[1], config_for(3, over)), train(models[0], config_for(0, over)))
    ours = {"activation_checkpointing": {"enabled": True}}
    assert_same(train(build(kind), config_for(3, over, **ours)), train(build(kind), config_for(0, over, **ours)))


@pytest.mark.parametrize("over", TRANSPORTS)
@pytest.mark.parametrize("kind", SIZES)
def test_its_own_checkpointing_and_ours_train_as_in_stage_0(ranks, kind, over):
    """G12"""
    ranks(2).run(_checkpoints, kind, over)


# -- construction and saving


def _builds_and_saves(kind: str, over: str, folder: str) -> None:
    config = config_for(3, over)
    plain = build(kind).state_dict()
    with partita.zero.Init(config=config):
        model = build(kind)
    engine, *_ = partita.initialize(model, config=config)
    assert_same_weights(engine.module_state_dict(), plain)
    ids = tokens_of(0, engine.global_rank)
    for _ in range(2):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    engine.save_16bit_model(folder)
    weights = engine.module_state_dict()
    inside.communicator(engine).barrier()
    fresh = build(kind)
    fresh.load_state_dict(load_file(Path(folder) / "model.safetensors"), strict=True)
    assert_same_weights(fresh.state_dict(), weights)
    assert not torch.equal(next(iter(weights.values())), next(iter(plain.values())))
    several = Path(folder) / "several"
    inside.save_in_files_of(engine, several, 20_000)
    assert len(list(several.glob("model-*-of-*.safetensors"))) > 1
    if engine.global_rank == 0:
        model.config.save_pretrained(folder)
        model.config.save_pretrained(several)
    inside.communicator(engine).barrier()
    for place in (folder, several):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(place)
        assert_same_weights(loaded.state_dict(), weights)
    engine.destroy()


@pytest.mark.parametrize("over", TRANSPORTS)
@pytest.mark.parametrize("kind", SIZES)
def test_it_is_built_partitioned_and_its_file_is_that_of_transformers(ranks, tmp_path, kind, over):
    """The weights of a plain construction with the seed; from_pretrained() reads what was saved."""
    ranks(2).run(_builds_and_saves, kind, over, str(tmp_path))


# -- adapters


def with_adapter(kind: str) -> nn.Module:
    import peft

    targets = GPT2_TARGETS if kind == "gpt2" else ["q_proj", "v_proj"]
    model = build(kind)
    torch.manual_seed(1)
    return peft.get_peft_model(  # type: ignore[no-any-return]
        model, peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules=targets, task_type="CAUSAL_LM")
    )


def _adapts(kind: str, over: str) -> None:
    config = config_for(3, over)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    expected = train(with_adapter(kind), config_for(0, over))
    assert_same(train(with_adapter(kind), config), expected)
    initial = with_adapter(kind).state_dict()
    changed = {name for name, value in initial.items() if not torch.equal(expected[1][name], value)}
    assert changed
    assert all("lora_" in name for name in changed)


@pytest.mark.parametrize("over", TRANSPORTS)
@pytest.mark.parametrize("kind", SIZES)
def test_a_lora_adapter_on_its_frozen_base_trains_as_in_stage_0(ranks, kind, over):
    """O6, G12"""
    pytest.importorskip("peft")
    ranks(2).run(_adapts, kind, over)
