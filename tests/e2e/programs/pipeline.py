"""A program for DeepSpeed: a network for images as a pipeline of layers (`-p 2`), or as it is (`-p 0`).

Nothing in it knows of Partita. The calls are those of DeepSpeed's example of a pipeline.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.utils import RepeatingLoader
from pictures import Pictures
from torch import nn


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("-s", "--steps", type=int, default=4)
    parser.add_argument("-p", "--pipeline-parallel-size", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1138)
    parser.add_argument("--out", type=Path, required=True)
    return deepspeed.add_config_arguments(parser).parse_args()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3),
        )  # fmt: skip
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(nn.Linear(48, 32), nn.ReLU(inplace=True), nn.Linear(32, 10))

    def forward(self, x: Any) -> Any:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def join_layers(net: Net) -> list[Any]:
    return [*net.features, net.avgpool, lambda x: torch.flatten(x, 1), *net.classifier]


def train_base(arguments: argparse.Namespace) -> list[float]:
    torch.manual_seed(arguments.seed)
    net = Net()
    parameters = [p for p in net.parameters() if p.requires_grad]
    engine, _, loader, _ = deepspeed.initialize(
        args=arguments, model=net, model_parameters=parameters, training_data=Pictures(64, 2)
    )
    batches = iter(RepeatingLoader(loader))
    criterion = torch.nn.CrossEntropyLoss()
    losses = []
    for _ in range(arguments.steps * engine.gradient_accumulation_steps()):
        inputs, labels = next(batches)
        loss = criterion(engine(inputs.to(engine.device)), labels.to(engine.device))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def train_pipe(arguments: argparse.Namespace, part: str = "parameters") -> list[float]:
    torch.manual_seed(arguments.seed)
    deepspeed.runtime.utils.set_random_seed(arguments.seed)
    net = PipelineModule(
        layers=join_layers(Net()),
        loss_fn=torch.nn.CrossEntropyLoss(),
        num_stages=arguments.pipeline_parallel_size,
        partition_method=part,
        activation_checkpoint_interval=0,
    )
    parameters = [p for p in net.parameters() if p.requires_grad]
    engine, _, _, _ = deepspeed.initialize(
        args=arguments, model=net, model_parameters=parameters, training_data=Pictures(64, 2)
    )
    return [engine.train_batch().item() for _ in range(arguments.steps)]


def main() -> None:
    arguments = arguments_of()
    deepspeed.init_distributed(dist_backend="gloo")
    losses = (train_pipe if arguments.pipeline_parallel_size else train_base)(arguments)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, losses)
    if dist.get_rank() == 0:
        arguments.out.write_text(json.dumps({"losses": everyone}))


if __name__ == "__main__":
    main()
