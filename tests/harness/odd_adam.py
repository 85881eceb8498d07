"""Parameters of odd sizes with dictated gradients, and FusedAdam over them."""

from __future__ import annotations

from typing import Any

import torch
from partita.optim import FusedAdam
from torch import Tensor, nn

SHAPES = [(1,), (7, 3), (0,), (16,), (17,), (5, 1, 9), (1000,), (), (2, 31)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def odd_parameters(dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def rounded(master: Tensor, dtype: torch.dtype) -> Tensor:
    """To nearest; of two equally near, bf16 takes the larger magnitude, others the even one."""
    if dtype != torch.bfloat16:
        return master.to(dtype)
    return ((master.view(torch.int32) + 0x8000) & ~0xFFFF).view(torch.float32).to(dtype)


def set_grads(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        grad = torch.randn(parameter.shape, generator=generator).bfloat16().half()  # exact in every dtype
        parameter.grad = grad.to(parameter.dtype)


def trained(dtype: torch.dtype, steps: int) -> tuple[list[nn.Parameter], FusedAdam]:
    parameters = odd_parameters(dtype)
    optimizer = FusedAdam(parameters, **OPTIONS)
    for step in range(steps):
        set_grads(parameters, step)
        optimizer.step()
    return parameters, optimizer
