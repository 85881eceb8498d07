"""A program for DeepSpeed: two engines against each other, with a loss of one that runs through the other.

Nothing in it knows of Partita. The calls are those of DeepSpeed's example of a GAN, on vectors.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--out", type=Path, required=True)
    return deepspeed.add_config_arguments(parser).parse_args()


def generator() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(True), nn.Linear(16, 9), nn.Tanh())


def discriminator() -> nn.Module:
    return nn.Sequential(nn.Linear(9, 16), nn.LeakyReLU(0.2, inplace=True), nn.Linear(16, 1), nn.Sigmoid())


def main() -> None:
    arguments = arguments_of()
    deepspeed.init_distributed(dist_backend="gloo")
    torch.manual_seed(999)
    net_g, net_d = generator(), discriminator()
    criterion = nn.BCELoss()
    adam_d = torch.optim.Adam(net_d.parameters(), lr=2e-3, betas=(0.5, 0.999))
    adam_g = torch.optim.Adam(net_g.parameters(), lr=2e-3, betas=(0.5, 0.999))
    engine_d, adam_d, _, _ = deepspeed.initialize(
        args=arguments, model=net_d, model_parameters=net_d.parameters(), optimizer=adam_d
    )
    engine_g, adam_g, _, _ = deepspeed.initialize(
        args=arguments, model=net_g, model_parameters=net_g.parameters(), optimizer=adam_g
    )
    data = torch.rand(8, 6, 9, generator=torch.Generator().manual_seed(3 + dist.get_rank()))
    noise = torch.randn(8, 6, 5, generator=torch.Generator().manual_seed(5 + dist.get_rank()))
    losses = []
    for real, z in zip(data, noise, strict=True):
        net_d.zero_grad()
        label = torch.full((len(real),), 1.0)
        loss_real: Tensor = criterion(net_d(real).squeeze(1), label)
        engine_d.backward(loss_real)
        fake = net_g(z)
        label.fill_(0)
        loss_fake: Tensor = criterion(net_d(fake.detach()).squeeze(1), label)
        engine_d.backward(loss_fake)
        engine_d.step()
        net_g.zero_grad()
        label.fill_(1)
        loss_g: Tensor = criterion(net_d(fake).squeeze(1), label)
        engine_g.backward(loss_g)
        engine_g.step()
        losses.append([(loss_real + loss_fake).item(), loss_g.item()])
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, losses)
    if dist.get_rank() == 0:
        arguments.out.write_text(json.dumps({"losses": everyone}))


if __name__ == "__main__":
    main()
