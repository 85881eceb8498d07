"""What the tests on a GPU share: the devices, the mark that skips without one, and bits to compare."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def bits(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().view(torch.int16 if tensor.dtype.itemsize == 2 else torch.int32)
