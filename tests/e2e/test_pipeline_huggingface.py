"""Hugging Face decoders as layers of a pipeline: the bits of the model, however it is divided."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from partita.pipeline import PipelineModule, decoder_layers
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
    assert torch.equal(module(inputs), model(**inputs, use_cache=True).logits) or batch == "packed"
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
