"""Models of transformers inside zero.Init: normed convolutions, cloned layers, from_config, from_pretrained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import partita
import pytest
import torch
from blocks_model import TRANSPORTS, assert_same_weights
from partita import zero
from partita.zero import GatheredParameters
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

LAYERS: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
}
SPEECH: dict[str, Any] = {
    **LAYERS,
    "conv_dim": (8, 8),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    **dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "layerdrop"), 0),
    "mask_time_prob": 0.0,
}
PAIR: dict[str, Any] = {
    **dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 20),
    "d_model": 32,
}


def _detector(kind: str, **settings: Any) -> nn.Module:
    """Deep copies of heads for each decoder layer, with a backbone built from a config."""
    stages = ["stage1", "stage2"]
    backbone = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], out_features=stages)
    common = {"num_queries": 5, "use_timm_backbone": False, "backbone": None, "backbone_config": backbone}
    config = transformers.AutoConfig.for_model(kind, **PAIR, **common, **settings)
    return transformers.AutoModelForObjectDetection.from_config(config)  # type: ignore[no-any-return]


def _encoded() -> nn.Module:
    """Old or new weight_norm on every convolution, and recurrent layers."""
    return transformers.EncodecModel(  # type: ignore[no-any-return]
        transformers.EncodecConfig(
            num_filters=4, hidden_size=8, codebook_dim=8, num_lstm_layers=1, codebook_size=8, upsampling_ratios=[2, 2]
        )
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "wav2vec2": lambda: transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**SPEECH)),
    "hubert": lambda: transformers.HubertModel(transformers.HubertConfig(**SPEECH)),
    "detr": lambda: _detector("detr"),
    "deformable_detr": lambda: _detector("deformable_detr", with_box_refine=True, two_stage=True, num_feature_levels=2),
    "encodec": _encoded,
    "llama in bf16": lambda: transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**LAYERS, vocab_size=31), dtype=torch.bfloat16
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(**PAIR, vocab_size=31, max_position_embeddings=20)
    ),
}


def _config(stage: int, transport: str) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 2000, "stage3_param_persistence_threshold": 0},
        "comm": {"transport": transport, "timeout_seconds": 60},
        "steps_per_print": 0,
    }


def _plain(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def _inside(make: Callable[[], nn.Module], transport: str) -> nn.Module:
    torch.manual_seed(torch.distributed.get_rank())
    with zero.Init(config=_config(3, transport)):
        return make()


def _whole(model: nn.Module) -> dict[str, Tensor]:
    with GatheredParameters(model.parameters()):
        return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _builds(transport: str, names: list[str]) -> None:
    for name in names:
        model = _inside(MODELS[name], transport)
        assert all(p.untyped_storage().nbytes() == 0 for p in model.parameters()), name
        assert_same_weights(_whole(model), dict(_plain(name).state_dict()), name)


def test_they_are_built_with_the_weights_of_a_plain_construction(ranks):
    """F23, F40: on two ranks and on three, over both transports."""
    ranks(2).run(_builds, TRANSPORTS[0], list(MODELS))
    ranks(2).run(_builds, TRANSPORTS[1], ["wav2vec2", "detr"])
    ranks(3).run(_builds, TRANSPORTS[0], ["wav2vec2", "detr"])


def _loads(folder: str, name: str) -> None:
    plain = _plain(name)
    if torch.distributed.get_rank() == 0:
        plain.save_pretrained(folder)  # type: ignore[operator]
    torch.distributed.barrier()
    model = _inside(lambda: type(plain).from_pretrained(folder), TRANSPORTS[0])  # type: ignore[attr-defined]
    assert all(p.untyped_storage().nbytes() == 0 for p in model.parameters())
    assert_same_weights(_whole(model), dict(plain.state_dict()), name)


@pytest.mark.parametrize("name", ["wav2vec2", "bart"])
def test_their_files_are_loaded_partitioned(ranks, tmp_path, name):
    ranks(2).run(_loads, str(tmp_path), name)


def _steps(model: nn.Module, config: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    engine = partita.Engine(model=model, config=config)
    losses = []
    for step in range(3):
        generator = torch.Generator().manual_seed(10 * step + engine.global_rank)
        loss = engine(torch.randn(1, 300, generator=generator)).last_hidden_state.float().square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    weights = engine.module_state_dict()
    engine.destroy()
    return losses, weights


def _trains(transport: str) -> None:
    expected = _steps(_plain("wav2vec2"), _config(0, transport))
    actual = _steps(_inside(MODELS["wav2vec2"], transport), _config(3, transport))
    assert actual[0] == expected[0]
    assert_same_weights(actual[1], expected[1])
    assert not torch.equal(next(iter(expected[1].values())), next(iter(_plain("wav2vec2").state_dict().values())))


@pytest.mark.parametrize("path", TRANSPORTS)
def test_wav2vec2_trains_as_in_stage_0(ranks, path):
    """A parametrised weight is computed from parameters that come and go."""
    ranks(2).run(_trains, path)
