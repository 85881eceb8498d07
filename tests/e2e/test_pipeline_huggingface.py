"""Hugging Face decoders as layers of a pipeline: the bits of the model, however it is divided."""

from __future__ import annotations

from functools import partial
from typing import Any

import partita
import pytest
import torch
from partita.pipeline import PipelineModule, decoder_layers, decoder_names
from test_huggingface import SIZES, build
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

KINDS = [*SIZES, "llama, tied"]
IDS = torch.randint(1, 51, (3, 9), generator=torch.Generator().manual_seed(1))
PADDED = torch.ones(3, 9, dtype=torch.int64)
PADDED[1, 6:] = PADDED[2, :2] = 0
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(3, 9)
BATCHES = {
    "ids": {"input_ids": IDS},
    "padded": {"input_ids": IDS, "attention_mask": PADDED},
    "packed": {"input_ids": IDS, "position_ids": PACKED},
    "no padding": {"input_ids": IDS, "attention_mask": torch.ones_like(PADDED)},
}


def built(kind: str, attention: str = "sdpa") -> Any:
    """A tiny model with random weights, the same on every call."""
    torch.manual_seed(0)
    name = kind.split(",")[0]
    config = transformers.AutoConfig.for_model(
        name, **SIZES[name], bos_token_id=0, eos_token_id=0, pad_token_id=0, use_cache=False
    )
    if kind == "llama, tied":
        config.tie_word_embeddings = True
    config._attn_implementation = attention
    return transformers.AutoModelForCausalLM.from_config(config)


def loss_of(model: Any) -> Any:
    return partial(model.loss_function, vocab_size=model.config.vocab_size)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.pairwise
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_have_the_bits_of_the_model(kind, batch, attention):
    inputs = BATCHES[batch]
    model = built(kind, attention)
    torch.manual_seed(5)
    out = model(**inputs, labels=IDS)
    out.loss.backward()
    same = built(kind, attention)
    module = PipelineModule(decoder_layers(same), num_stages=1, loss_fn=loss_of(same))
    torch.manual_seed(5)
    loss = module(inputs, IDS)
    loss.backward()
    assert torch.equal(loss, out.loss)
    assert len(gradients(model)) == len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(gradients(same), gradients(model), strict=True))
    model.eval()
    module.eval()
    assert torch.equal(module(inputs), model(**inputs).logits)
    if batch != "packed":  # with a cache, products of other strides: on some processors in another order of sums
        torch.testing.assert_close(module(inputs), model(**inputs, use_cache=True).logits, rtol=1e-5, atol=1e-6)
    if batch == "ids":
        assert torch.equal(module(IDS), model(IDS).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_head_is_a_tie_of_the_stages(kind):
    module = PipelineModule(decoder_layers(built(kind)), num_stages=1, activation_checkpoint_interval=2)
    module.build([0, 0, 0])
    tied = kind != "llama"
    assert module.replicas == ({"4.weight": "0.tokens.weight"} if tied else {})
    expected = built(kind)
    module.eval()
    expected.eval()
    assert torch.equal(module(BATCHES["padded"]), expected(**BATCHES["padded"]).logits)
    assert sum(p.numel() for n, p in module.named_parameters() if n not in module.replicas) == sum(
        p.numel() for p in expected.parameters()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_weights_go_back_into_the_model(kind):
    model = built(kind)
    layers = decoder_layers(model)
    names = decoder_names(model, layers)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    module = PipelineModule(layers, num_stages=1)
    module.build([0, 0, 0])
    saved = {name: value for name, value in module.state_dict().items() if name not in module.replicas}
    fresh = without_values(built(kind))
    fresh.load_state_dict({name: saved[own] for name, own in names.items()})
    assert fresh.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in fresh.state_dict().items())


def without_values(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    return model


def test_parts_may_be_named():
    sizes = {"hidden_size": 20, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model("gpt_neox", **sizes, vocab_size=51, max_position_embeddings=32)
    ).eval()
    names = {"embeddings": "embed_in", "dropout": "emb_dropout", "rotary": "rotary_emb", "blocks": "layers"}
    parts = {part: f"gpt_neox.{name}" for part, name in (names | {"norm": "final_layer_norm"}).items()}
    head = "lm_head" if hasattr(model, "lm_head") else "embed_out"
    layers = decoder_layers(model, **parts, head=head)
    inputs = BATCHES["padded"]
    assert torch.equal(nn.Sequential(*layers)(inputs), model(**inputs).logits)
    with pytest.raises(ValueError, match=r"GPTNeoXForCausalLM has no module model\.norm: name the part with norm="):
        decoder_layers(model, **{**parts, "norm": None}, head=head)
    with pytest.raises(ValueError, match="GPTNeoXForCausalLM computes something beside"):
        decoder_layers(model, **{**parts, "norm": "gpt_neox.emb_dropout"}, head=head)


def test_another_family_is_compared():
    sizes = {**SIZES["llama"], "pad_token_id": 0}
    torch.manual_seed(0)
    qwen = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("qwen2", **sizes))
    qwen.train()
    assert len(decoder_layers(qwen)) == 5
    assert all(part.training for part in qwen.modules())
    granite = transformers.AutoConfig.for_model("granite", **sizes, logits_scaling=2.0)
    with pytest.raises(ValueError, match="GraniteForCausalLM computes something beside its embeddings"):
        decoder_layers(transformers.AutoModelForCausalLM.from_config(granite))


def test_what_is_no_plain_decoder_is_refused():
    with pytest.raises(ValueError, match="Linear is no model of transformers"):
        decoder_layers(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no module transformer\.h: name .* blocks="):
        decoder_layers(build("llama"), blocks="transformer.h")
    with pytest.raises(ValueError, match="blocks is lm_head, a Linear: it is a list"):
        decoder_layers(build("llama"), blocks="lm_head")
    sliding = build("llama")
    sliding.config.sliding_window = 4
    with pytest.raises(ValueError, match="attention over a sliding window"):
        decoder_layers(sliding)
    with pytest.raises(ValueError, match="a batch has token_type_ids; the inputs are input_ids"):
        decoder_layers(build("gpt2"))[0]({"input_ids": IDS, "token_type_ids": IDS})


# -- trained


def micro_batches(step: int, rank: int) -> list[tuple[dict[str, Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    ids = torch.randint(1, 51, (4, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return [({"input_ids": ids[i : i + 2], "attention_mask": mask[i : i + 2]}, ids[i : i + 2]) for i in (0, 2)]


def without_dropout(model: Any) -> Any:
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return model


def alone(kind: str, copies: int) -> list[float]:
    """Losses of plain PyTorch on all batches."""
    model = without_dropout(built(kind))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(3):
        batches = [batch for rank in range(copies) for batch in micro_batches(step, rank)]
        loss = sum(model(**inputs, labels=labels).loss for inputs, labels in batches) / len(batches)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _trains(kind: str, num_stages: int, world_size: int) -> None:
    model = without_dropout(built(kind))
    layers = decoder_layers(model)
    module = PipelineModule(layers, num_stages=num_stages, loss_fn=loss_of(model), activation_checkpoint_interval=1)
    del model, layers
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 1e-2}},
        "zero_optimization": {"stage": 1},
        "comm": {"timeout_seconds": 60},
        "steps_per_print": 0,
    }
    engine, *_ = partita.initialize(model=module, config=config)
    rank = engine.global_rank % (world_size // num_stages)
    losses = [engine.train_batch(iter(micro_batches(step, rank))).item() for step in range(3)]
    engine.destroy()
    torch.testing.assert_close(losses, alone(kind, world_size // num_stages), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "num_stages", "world_size"),
    [("gpt2", 2, 2), ("llama", 2, 2), pytest.param("gpt2", 2, 4, marks=pytest.mark.slow)],
)
def test_it_trains_as_in_one_process(ranks, kind, num_stages, world_size):
    ranks(world_size).run(_trains, kind, num_stages, world_size)
