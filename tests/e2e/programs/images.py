"""A program for DeepSpeed: a small network for images, with DeepSpeed's own loader of its data, and a test at the end.

Nothing in it knows of Partita. The calls are those of DeepSpeed's first example.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from pictures import Net, Pictures
from torch import nn


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="fp16", choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--stage", default=0, type=int, choices=[0, 1, 2, 3])
    parser.add_argument("--local_rank", default=-1, type=int)
    parser.add_argument("--out", type=Path, required=True)
    return deepspeed.add_config_arguments(parser).parse_args()


def config_of(arguments: argparse.Namespace) -> dict[str, Any]:
    adam = {"lr": 0.01, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7, "torch_adam": True}
    warm_up = {"warmup_min_lr": 0, "warmup_max_lr": 0.01, "warmup_num_steps": 20}
    return {
        "train_batch_size": 16,
        "steps_per_print": 2000,
        "optimizer": {"type": "Adam", "params": adam},
        "scheduler": {"type": "WarmupLR", "params": warm_up},
        "gradient_clipping": 1.0,
        "prescale_gradients": False,
        "bf16": {"enabled": arguments.dtype == "bf16"},
        "fp16": {
            "enabled": arguments.dtype == "fp16",
            "fp16_master_weights_and_grads": False,
            "loss_scale": 0,
            "loss_scale_window": 500,
            "hysteresis": 2,
            "min_loss_scale": 1,
            "initial_scale_power": 15,
        },
        "wall_clock_breakdown": False,
        "zero_optimization": {
            "stage": arguments.stage,
            "allgather_partitions": True,
            "reduce_scatter": True,
            "allgather_bucket_size": 50000000,
            "reduce_bucket_size": 50000000,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "cpu_offload": False,
        },
    }


def test(engine: Any, data: Pictures, device: str, dtype: torch.dtype | None) -> float:
    correct = 0
    engine.eval()
    with torch.no_grad():
        for images, labels in torch.utils.data.DataLoader(data, batch_size=4, shuffle=False):
            outputs = engine(images.to(device if dtype is None else dtype))
            _, predicted = torch.max(outputs.data, 1)
            correct += (predicted == labels.to(device)).sum().item()
    return correct / len(data)


def main(arguments: argparse.Namespace) -> None:
    deepspeed.init_distributed()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    torch.manual_seed(0)
    net = Net()
    parameters = filter(lambda p: p.requires_grad, net.parameters())
    engine, _optimizer, loader, _schedule = deepspeed.initialize(
        args=arguments,
        model=net,
        model_parameters=parameters,
        training_data=Pictures(96, 2),
        config=config_of(arguments),
    )
    device = get_accelerator().device_name(engine.local_rank)
    dtype = None
    if engine.bfloat16_enabled():
        dtype = torch.bfloat16
    elif engine.fp16_enabled():
        dtype = torch.half
    criterion = nn.CrossEntropyLoss()
    losses, rates = [], []
    for _epoch in range(2):
        for inputs, labels in loader:
            inputs = inputs.to(device)
            if dtype is not None:
                inputs = inputs.to(dtype)
            loss = criterion(engine(inputs), labels.to(device))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
            rates += engine.get_lr()
    total = torch.tensor(losses, dtype=torch.float64)
    torch.distributed.all_reduce(total)
    accuracy = test(engine, Pictures(40, 3), device, dtype)
    if engine.local_rank == 0:
        mean = (total / deepspeed.comm.get_world_size()).tolist()
        arguments.out.write_text(json.dumps({"losses": mean, "rates": rates, "accuracy": accuracy}))


if __name__ == "__main__":
    main(arguments_of())
