"""Made-up pictures, and a small network for them: what programs for DeepSpeed and loops of torch share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Pictures(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Made-up pictures of ten kinds, 3 x 12 x 12."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        kinds = torch.randn(10, 3, 12, 12, generator=torch.Generator().manual_seed(1))
        self.labels = torch.randint(10, (count,), generator=generator)
        self.pictures = kinds[self.labels] + 0.5 * torch.randn(count, 3, 12, 12, generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.pictures[i], int(self.labels[i])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 3)
        self.fc1 = nn.Linear(16, 20)
        self.fc2 = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))
