"""Decoders of Hugging Face as layers of a pipeline."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

# The names of the parts. A model is taken for a GPT-2 where it has GPT-2's list of blocks.
GPT2 = {
    "embeddings": "transformer.wte",
    "positions": "transformer.wpe",
    "dropout": "transformer.drop",
    "rotary": None,
    "blocks": "transformer.h",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}
LLAMA = {
    "embeddings": "model.embed_tokens",
    "positions": None,
    "dropout": None,
    "rotary": "model.rotary_emb",
    "blocks": "model.layers",
    "norm": "model.norm",
    "head": "lm_head",
}
PROVED = ("gpt2", "llama")  # tests compare them; others are compared when they are taken apart
OPTIONAL = ("positions", "dropout", "rotary")
HIDDEN = "hidden_states"
INPUTS = ("input_ids", "attention_mask", "position_ids")


def decoder_layers(
    model: nn.Module,
    *,
    embeddings: str | None = None,
    positions: str | None = None,
    dropout: str | None = None,
    rotary: str | None = None,
    blocks: str | None = None,
    norm: str | None = None,
    head: str | None = None,
) -> list[nn.Module]:
    """The layers of a causal language model of transformers, for `PipelineModule`: embeddings, blocks, norm, head.

    One after the other they compute what the model computes with `use_cache=False`, with the same bits: from
    `input_ids` (int64, batch x length), or from a dict of them with `attention_mask` or `position_ids`, to logits
    (batch x length x vocabulary). The layers are parts of the model itself, and tied weights stay tied. The model's
    loss is `functools.partial(model.loss_function, vocab_size=model.config.vocab_size)`.

    Each argument names a part of the model ("transformer.h"). Those that are left out are GPT-2's where the model has
    `transformer.h`, else Llama's. What is named, or is of another family, may compute something beside these parts:
    the model and the layers are both called with some tokens then, and compared.

    Args:
        embeddings: of tokens.
        positions: embeddings of positions, which are added to those of tokens. Need not exist.
        dropout: behind their sum. Need not exist.
        rotary: from hidden states and position ids to the `position_embeddings` of all blocks. Need not exist.
        blocks: called with hidden states, attention mask and position ids, one after the other.
        norm: behind the last block.
        head: from hidden states to logits.

    Raises:
        ValueError: the model has no such part, or computes something else; says what.
    """
    config = _plain_config(model)
    defaults = LLAMA if _find(model, "transformer.h") is None else GPT2
    given = {"embeddings": embeddings, "positions": positions, "dropout": dropout, "rotary": rotary}
    given |= {"blocks": blocks, "norm": norm, "head": head}
    parts = {name: _part(model, name, given[name], defaults[name]) for name in given}
    layers = [
        DecoderEmbeddings(parts["embeddings"], parts["positions"], parts["dropout"]),
        *(DecoderBlock(block, config, parts["rotary"]) for block in parts["blocks"]),
        DecoderNorm(parts["norm"]),
        parts["head"],
    ]
    if config.model_type not in PROVED or any(given.values()):
        _require_same(model, layers)
    return layers


def decoder_names(model: nn.Module, layers: Sequence[nn.Module]) -> dict[str, str]:
    """For each name in the model's state dict the name in that of the layers; to be asked before they are trained.

    `{name: weights[own] for name, own in names.items()}` makes a state dict of the model from one of the pipeline. Tied
    weights have the name in the first layer that has them, which is the one that is saved.
    """
    own: dict[int, str] = {}
    for i, layer in enumerate(layers):
        for name, tensor in layer.state_dict(keep_vars=True).items():
            own.setdefault(id(tensor), f"{i}.{name}")
    return {name: own[id(tensor)] for name, tensor in model.state_dict(keep_vars=True).items()}


class DecoderEmbeddings(nn.Module):
    """From tokens to hidden states."""

    def __init__(self, tokens: nn.Module, positions: nn.Module | None, dropout: nn.Module | None) -> None:
        super().__init__()
        self.tokens = tokens
        self.positions = positions
        self.dropout = dropout

    def forward(self, inputs: Tensor | Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """Hidden states, or a dict of them with what the blocks need beside them."""
        rest = {} if isinstance(inputs, Tensor) else {key: value for key, value in inputs.items() if value is not None}
        if unknown := sorted(rest.keys() - set(INPUTS)):
            raise ValueError(f"decoder_layers: a batch has {', '.join(unknown)}; the inputs are {', '.join(INPUTS)}")
        input_ids = inputs if isinstance(inputs, Tensor) else rest.pop("input_ids")
        hidden = self.tokens(input_ids)
        if self.positions is not None:
            hidden = hidden + self.positions(_position_ids(hidden, rest))
        if self.dropout is not None:
            hidden = self.dropout(hidden)
        return hidden if isinstance(inputs, Tensor) else {HIDDEN: hidden, **rest}


class DecoderBlock(nn.Module):
    """One block. The mask, and rotary embeddings, are made anew in each: that costs less than to send them."""

    def __init__(self, block: nn.Module, config: Any, rotary: nn.Module | None) -> None:
        super().__init__()
        self.block = block
        self.rotary = rotary
        self._config = config

    def forward(self, given: Tensor | dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """Hidden states as they came, alone or in a dict."""
        rest = {} if isinstance(given, Tensor) else given
        hidden = given if isinstance(given, Tensor) else given[HIDDEN]
        position_ids = _position_ids(hidden, rest)
        arguments = {"attention_mask": _causal_mask(self._config, hidden, rest), "position_ids": position_ids}
        if self.rotary is not None:
            arguments["position_embeddings"] = self.rotary(hidden, position_ids=position_ids)
        hidden = self.block(hidden, **arguments)
        if isinstance(hidden, tuple):  # before transformers 5
            hidden = hidden[0]
        return hidden if isinstance(given, Tensor) else {**given, HIDDEN: hidden}


class DecoderNorm(nn.Module):
    """Behind the last block: hidden states alone."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, given: Tensor | dict[str, Tensor]) -> Any:
        """Normalised hidden states."""
        return self.norm(given if isinstance(given, Tensor) else given[HIDDEN])


def _position_ids(hidden: Tensor, rest: Mapping[str, Tensor]) -> Tensor:
    """Of the batch, else 0, 1, ... for each sample."""
    given = rest.get("position_ids")
    return torch.arange(hidden.shape[1], dtype=torch.int64, device=hidden.device)[None] if given is None else given


def _causal_mask(config: Any, hidden: Tensor, rest: Mapping[str, Tensor]) -> Any:
    """As the model's own forward makes it. Without position ids nobody looks for packed sequences in them."""
    make, names = _mask_function()
    known = {
        "config": config,
        "inputs_embeds": hidden,
        "input_embeds": hidden,  # its name in transformers 4
        "attention_mask": rest.get("attention_mask"),
        "past_key_values": None,
        "position_ids": rest.get("position_ids"),
        "cache_position": torch.arange(hidden.shape[1], dtype=torch.int64, device=hidden.device),  # of transformers 4
    }
    return make(**{name: known[name] for name in names if name in known})


@cache
def _mask_function() -> tuple[Any, tuple[str, ...]]:
    make = importlib.import_module("transformers.masking_utils").create_causal_mask
    return make, tuple(inspect.signature(make).parameters)


def _find(model: nn.Module, path: str) -> Any:
    found: Any = model
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _part(model: nn.Module, name: str, given: str | None, default: str | None) -> Any:
    """The part of a model that is named, or that a family has."""
    path = given or default
    found = None if path is None else _find(model, path)
    if found is None and given is None and name in OPTIONAL:
        return None
    if not isinstance(found, nn.Module):
        raise ValueError(f"decoder_layers: {type(model).__name__} has no module {path}: name the part with {name}=...")
    if name == "blocks" and not isinstance(found, Iterable):
        raise ValueError(f"decoder_layers: blocks is {path}, a {type(found).__name__}: it is a list of modules")
    return found


def _plain_config(model: nn.Module) -> Any:
    """The config of a model. Raises ValueError for what the layers would leave out."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        raise ValueError(f"decoder_layers: {type(model).__name__} is no model of transformers with a config")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if getattr(config, "sliding_window", None) is not None or kinds:
        raise ValueError(
            f"decoder_layers: {type(model).__name__} has attention over a sliding window or of several kinds "
            "(sliding_window, layer_types of its config): only full attention is supported"
        )
    if getattr(config, "add_cross_attention", False) or getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"decoder_layers: {type(model).__name__} attends to an encoder: only decoders are supported")
    return config


def _require_same(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Raises ValueError if the layers do not give the model's logits for some tokens."""
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    ids = torch.arange(min(8, int(_find(model, "config.vocab_size") or 8)), dtype=torch.int64, device=device)[None]
    model.eval()
    try:
        with torch.no_grad():
            expected = model(input_ids=ids, use_cache=False).logits
            found: Any = ids
            for layer in layers:
                found = layer.eval()(found)
    finally:
        for module, mode in modes:
            module.training = mode
    if not torch.equal(found, expected):
        raise ValueError(
            f"decoder_layers: {type(model).__name__} computes something beside its embeddings, blocks, norm and head: "
            "the logits of the layers are not the model's; write its layers by hand"
        )
