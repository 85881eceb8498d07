"""The calls of articles about DeepSpeed, as they are written there, on a GPT-2, a DistilBERT and an LSTM.

Run as a program it prints what each group of calls gives, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import DistilBertConfig, DistilBertForSequenceClassification, GPT2Config, GPT2LMHeadModel

VOCABULARY = 50


class LSTMModel(nn.Module):
    """A classifier of sequences; with labels it returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.lstm = nn.LSTM(8, 16, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        hidden, _ = self.lstm(self.embedding(tokens))
        logits = self.head(hidden[:, -1])
        return logits if labels is None else nn.functional.cross_entropy(logits, labels)


class CustomOptimizer(torch.optim.Optimizer):
    """An optimizer that a user has written: a step against the gradient's sign."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad.sign(), alpha=-group["lr"])


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": VOCABULARY}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def distilbert() -> DistilBertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 32}
    return DistilBertForSequenceClassification(DistilBertConfig(**sizes, vocab_size=VOCABULARY, num_labels=3))


def lstm() -> LSTMModel:
    torch.manual_seed(0)
    return LSTMModel()


def samples(count: int = 24) -> TensorDataset:
    """Sequences whose class is in their first and last token."""
    tokens = torch.randint(3, VOCABULARY, (count, 9), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) % 3
    tokens[:, 0] = tokens[:, -1] = labels
    return TensorDataset(tokens, labels)


def evaluated(engine: Any) -> float:
    """Loss on the samples, in evaluation mode."""
    engine.eval()
    with torch.no_grad():
        tokens, labels = samples()[:]
        loss = nn.functional.cross_entropy(engine(tokens), labels)
    engine.train()
    return loss.item()


def an_engine_of_a_model() -> list[float]:
    from deepspeed import DeepSpeedEngine

    model = lstm()
    engine = DeepSpeedEngine(model=model)
    losses = [evaluated(engine)]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        for tokens, labels in DataLoader(samples(), batch_size=8):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(engine(tokens), labels)
            loss.backward()
            optimizer.step()
        losses.append(evaluated(engine))
    return losses


def an_engine_with_a_custom_optimizer() -> list[float]:
    from deepspeed import DeepSpeedEngine

    model = lstm()
    engine = DeepSpeedEngine(model=model, optimizer=CustomOptimizer(model.parameters()))
    losses = [evaluated(engine)]
    for _ in range(3):
        for tokens, labels in DataLoader(samples(), batch_size=8):
            loss = nn.functional.cross_entropy(engine(tokens), labels)
            engine.backward(loss)
            engine.step()
        losses.append(evaluated(engine))
    return losses


def train_batch_over_a_loader() -> list[float]:
    from deepspeed import DeepSpeedEngine

    model = lstm()
    train_loader = DataLoader(samples(), batch_size=8)
    config = {
        "train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01}},
        "zero_optimization": {"stage": 2},
    }
    engine = DeepSpeedEngine(model=model, train_data=train_loader, config_dict=config)
    losses = []
    for _epoch in range(3):
        for batch in train_loader:
            loss = engine.train_batch(batch)
            losses.append(loss.item())
    assert engine.global_steps == len(losses) == 9
    return losses


def chat_fine_tuning() -> list[float]:
    from deepspeed import DeepSpeedEngine

    model = gpt2()
    config = {
        "train_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "optimizer": {"type": "Adam", "params": {"lr": 5e-5}},
        "fp16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "reduce_scatter": True,
            "reduce_bucket_size": 5e8,
            "contiguous_gradients": False,
        },
        "steps_per_print": 100,
        "wall_clock_breakdown": True,
    }
    engine, optimizer, _, _ = DeepSpeedEngine.initialize(
        model=model, model_parameters=model.parameters(), config_dict_or_path=config
    )
    assert optimizer is engine.optimizer
    first = engine.save_config()
    assert os.path.samefile(first, "partita_config.json")
    losses = []
    for _epoch in range(3):
        for input_ids, _ in DataLoader(samples(16), batch_size=2):
            outputs = engine(input_ids, labels=input_ids)
            loss = outputs.loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    assert engine.global_steps == 6
    engine.save_checkpoint("checkpoints")
    assert os.path.samefile(engine.save_config(), "checkpoints/partita_config.json")
    means = torch.tensor(losses).view(3, -1).mean(dim=1)
    return means.tolist()


def a_plain_loop_with_the_default_config() -> list[float]:
    from deepspeed import DeepSpeed, DeepSpeedConfig, init_distributed
    from deepspeed.utils import get_default_deepspeed_config

    init_distributed()
    config = get_default_deepspeed_config()
    config["train_batch_size"] = DeepSpeedConfig(config).train_batch_size * 8
    model = distilbert()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    engine = DeepSpeed(model=model, optimizer=optimizer, config=config)
    losses = []
    for _epoch in range(4):
        for tokens, labels in DataLoader(samples(), batch_size=8):
            optimizer.zero_grad()
            loss = engine(input_ids=tokens, labels=labels).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert engine.global_steps == 12
    means = torch.tensor(losses).view(4, -1).mean(dim=1)
    return means.tolist()


GROUPS = (
    an_engine_of_a_model,
    an_engine_with_a_custom_optimizer,
    train_batch_over_a_loader,
    chat_fine_tuning,
    a_plain_loop_with_the_default_config,
)

if __name__ == "__main__":
    json.dump({group.__name__: group() for group in GROUPS}, sys.stdout)
