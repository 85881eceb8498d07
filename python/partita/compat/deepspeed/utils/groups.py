"""Groups of ranks: all of them train data-parallel copies, unless there is a pipeline."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from partita.comm import place_in_job
from partita.compat.deepspeed._absent import absent_names


def get_data_parallel_group() -> Any:
    """All ranks: torch's default group. A pipeline's ranks are told apart by the engine only."""
    return dist.group.WORLD


def get_data_parallel_world_size() -> int:
    """Ranks of the job."""
    return place_in_job()[1]


def get_data_parallel_rank() -> int:
    """This rank of the job."""
    return place_in_job()[0]


def get_tensor_model_parallel_world_size() -> int:
    """1: there is no tensor parallelism."""
    return 1


def get_tensor_model_parallel_rank() -> int:
    """0: there is no tensor parallelism."""
    return 0


def get_tensor_model_parallel_src_rank() -> int:
    """This rank: it is alone in its group."""
    return place_in_job()[0]


get_model_parallel_world_size = get_tensor_model_parallel_world_size
get_model_parallel_rank = get_tensor_model_parallel_rank

__getattr__ = absent_names(__name__)
