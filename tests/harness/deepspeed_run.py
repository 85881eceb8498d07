"""A run in DeepSpeed that saves, goes on, and writes down its losses: `python deepspeed_run.py OUT JSON`, on gloo.

Imports nothing of Partita, so that an environment with DeepSpeed alone runs it too.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, WIDTH, LENGTH, BATCH = 13, 10, 6, 4


class Block(nn.Module):
    """A feed-forward block with odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 17)
        self.down = nn.Linear(17, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Gpt(nn.Module):
    """Tied embeddings, a frozen parameter, buffers (one that is not saved), and causal attention."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH) / 10, requires_grad=False)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("mask", torch.ones(LENGTH, LENGTH).triu(1).bool(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position
        x = x + self.attention(x, x, x, attn_mask=self.mask, need_weights=False)[0]
        for block in self.blocks:
            x = block(x)
        if self.training:
            self.seen += 1
        logits = self.head(x)[:, :-1].float()
        return torch.nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1))


def new_model(layers: int = 2) -> Gpt:
    """The same one in every process."""
    torch.manual_seed(5)
    return Gpt(layers)


def tokens_of(step: int, rank: int) -> Tensor:
    """The micro-batch of a rank at a step, int64 of (BATCH, LENGTH)."""
    return torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(100 * step + rank))


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Param groups: matrices decay, vectors do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0, "lr": 0.02},
    ]


def config_of(asked: dict[str, Any]) -> dict[str, Any]:
    """The config of a run: `asked` has "stage", "precision" and "ranks", perhaps "schedule" and "more" keys."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": asked["stage"], **asked.get("zero", {})},
        "zero_allow_untested_optimizer": True,
        **asked.get("more", {}),
    }
    if asked["precision"] != "fp32":
        config[asked["precision"]] = {"enabled": True, **asked.get("scale", {})}
    if asked.get("schedule"):
        config["scheduler"] = {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 0.01, "warmup_num_steps": 8, "warmup_type": "linear"},
        }
    return config


MOMENTS = ("exp_avg", "exp_avg_sq")


def optimizer_of(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of torch that `kind` names."""
    return getattr(torch.optim, kind)(groups_of(model), lr=0.01)


def kept_by(engine: Any, asked: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Masters and moments of all parameters by name, as DeepSpeed itself finds them. A collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    named = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    if asked["stage"]:
        moment = partial(_moment_of_flat, engine) if asked["stage"] < 3 else safe_get_full_optimizer_state
        return {
            name: {
                "weight": safe_get_full_fp32_param(p).clone(),
                **{key: moment(p, key) for key in MOMENTS},
            }
            for name, p in named.items()
        }
    names = {p: name for name, p in named.items()}
    own = engine.optimizer  # torch's, or one with masters
    pairs = [(p, p) for p in names]
    if hasattr(own, "fp32_groups"):
        pairs = [
            pair for groups in zip(own.fp16_groups, own.fp32_groups, strict=True) for pair in zip(*groups, strict=True)
        ]
    return {
        names[p]: {"weight": m.detach().clone(), **{key: own.state[m][key].clone() for key in MOMENTS}}
        for p, m in pairs
    }


def _moment_of_flat(engine: Any, parameter: nn.Parameter, key: str) -> Tensor:
    """Stages 1 and 2: the parts of all ranks, at DeepSpeed's own addresses of them. A collective."""
    whole, here = torch.zeros(parameter.numel()), parameter._hp_mapping
    if here is not None:
        own = engine.optimizer
        group = next(i for i, one in enumerate(own.bit16_groups) if any(p is parameter for p in one))
        flat = own.optimizer.state[own.single_partition_of_fp32_groups[group]][key]
        into, part = here.lp_fragment_address, here.hp_fragment_address
        whole[into.start : into.start + into.numel] = flat[part.start : part.start + part.numel]
    torch.distributed.all_reduce(whole)
    return whole.view(parameter.shape)


def run(out: Path, asked: dict[str, Any]) -> None:
    """Trains asked["before"] steps, saves, and trains asked["after"] more. Rank 0 writes OUT/losses.json."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)
    model = new_model()
    optimizer = optimizer_of(asked.get("optimizer", "AdamW"), model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config_of(asked))
    rank, losses = torch.distributed.get_rank(), []
    for step in range(asked["before"] + asked["after"]):
        loss = engine(tokens_of(step, rank))
        engine.backward(loss)
        engine.step()
        total = loss.detach().float().reshape(1).clone()
        torch.distributed.all_reduce(total)
        losses.append(total.item() / torch.distributed.get_world_size())
        if step == asked["before"] - 1:
            client_state = {"note": "hello", "numbers": [1, 2.5], "pair": (1, 2), "tensor": torch.arange(3)}
            engine.save_checkpoint(str(out), client_state=client_state)
            kept = kept_by(engine, asked)
            if rank == 0:
                torch.save(kept, out / "kept.pt")
    if rank == 0:
        (out / "losses.json").write_text(json.dumps(losses))
    torch.distributed.barrier()


if __name__ == "__main__":
    run(Path(sys.argv[1]), json.loads(sys.argv[2]))
