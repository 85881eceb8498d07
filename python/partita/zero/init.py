"""Building a model whose parameters never exist as a whole on any rank."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from partita.config import load_config
from partita.zero.partitioner import partition_module, partitioning
from partita.zero.storage import ShardMemory

if TYPE_CHECKING:
    from partita.config import Config

HOST_NAMES = (None, "none", "cpu")


class Init:
    """Modules that are constructed inside the block are partitioned over the ranks as they are built.

    Each rank computes the same values, from rank 0's random state, and keeps its part; so a model comes out with the
    same weights as one that is built on rank 0 without `Init`. Whole parameters exist for one module at a time: the one
    that registers parameters, or whose parameters were used last. Code inside the block may use any parameter, and any
    view of one, at any time, the same on all ranks and in the thread that opened the block:
    `model.apply(init_weights)`, `nn.init.normal_(p)`, `nn.Parameter(other.weight)`, `copy.deepcopy(layer)`. Blocks may
    be nested: the outermost one partitions, the inner ones say the dtype of what is built in them.

    `partita.initialize()` takes the result in any stage. Until then, `GatheredParameters` reads and writes it.

    Arguments have DeepSpeed's names and order. Those that would change another engine's machinery are accepted with the
    values that ask for nothing.

    Args:
        module: built before, and partitioned at once, with rank 0's values; no block is needed for that.
        data_parallel_group: None, or the group of all ranks.
        mem_efficient_linear: true or false; both are the linear layer of torch.
        remote_device: "cpu": shards are kept on the host, wherever the model is built; None: as the config's
            `zero_optimization.offload_param.device` says, else on the model's device.
        pin_memory: shards on the host are in pinned memory.
        config_dict_or_path: as the config of `initialize()`, of which `comm`, the compute dtype and `offload_param`
            matter here; None: the defaults. `config` is the same.
        enabled: false builds the model as without `Init`.
        dtype: of the floating-point parameters that are created; None: bfloat16 or float16 where the config enables
            it, else torch's default. Initial values are rounded to the dtype, and so are the masters made from them:
            give torch.float32 to begin with all bits of the values.
        mpu, zero_param_parallel_group, sequence_data_parallel_group, param_swapper: None.
        zero_quantized_weights, zero_quantized_nontrainable_weights: false.

    Raises:
        ValueError, TypeError: an argument asks for what Partita does not have; names the argument.
        RuntimeError: when the block ends: ranks drew different random numbers, or registered different parameters, so
            they built different models.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
        zero_param_parallel_group: Any = None,
        zero_quantized_weights: bool = False,
        zero_quantized_nontrainable_weights: bool = False,
        sequence_data_parallel_group: Any = None,
        param_swapper: Any = None,
    ) -> None:
        _refuse_module(module)
        _refuse_groups(data_parallel_group=data_parallel_group, mpu=mpu)
        _refuse_groups(zero_param_parallel_group=zero_param_parallel_group, param_swapper=param_swapper)
        _refuse_groups(sequence_data_parallel_group=sequence_data_parallel_group)
        _refuse_quantized("zero_quantized_weights", zero_quantized_weights)
        _refuse_quantized("zero_quantized_nontrainable_weights", zero_quantized_nontrainable_weights)
        self._enabled = enabled
        self._exits = ExitStack()
        if not enabled:
            return
        self._config = _one_config(config_dict_or_path, config)
        self._memory = _shard_memory(self._config, remote_device, pin_memory)
        self._dtype = _dtype_of(self._config, dtype)
        if module is not None:
            partition_module(module, self._config, self._memory)

    def __enter__(self) -> Init:
        if not self._enabled:
            return self
        with ExitStack() as exits:
            exits.enter_context(partitioning(self._config, self._memory))
            if self._dtype is not None:
                exits.callback(torch.set_default_dtype, torch.get_default_dtype())
                torch.set_default_dtype(self._dtype)
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._exits.__exit__(*error)


def _one_config(config_dict_or_path: Any, config: Any) -> Config:
    if config_dict_or_path is not None and config is not None and config is not config_dict_or_path:
        raise ValueError("zero.Init: config_dict_or_path and config are two names of one argument: give one of them")
    source = config if config_dict_or_path is None else config_dict_or_path
    return load_config({"train_micro_batch_size_per_gpu": 1} if source is None else source)


def _dtype_of(config: Config, dtype: torch.dtype | None) -> torch.dtype | None:
    if dtype is not None:
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"zero.Init: dtype is {dtype!r}: it must be a floating-point torch.dtype, or None")
        return dtype
    if config.bf16.enabled:
        return torch.bfloat16
    return torch.float16 if config.fp16.enabled else None


def _shard_memory(config: Config, remote_device: str | None, pin_memory: bool) -> ShardMemory:
    if remote_device not in HOST_NAMES:
        raise ValueError(
            f"zero.Init: remote_device is {remote_device!r}: shards are kept on the model's device, or on the host, "
            'which is "cpu"'
        )
    offload = config.zero_optimization.offload_param
    if remote_device is None and offload.device == "cpu":
        return ShardMemory(on_host=True, pin=offload.pin_memory)
    return ShardMemory(on_host=remote_device == "cpu", pin=pin_memory)


def _refuse_module(module: Any) -> None:
    if module is not None and not isinstance(module, nn.Module):
        raise TypeError(
            f"zero.Init: module is a {type(module).__name__}: it is a torch.nn.Module that was built before; "
            "give a config as config="
        )


def _refuse_groups(**given: Any) -> None:
    """Raises ValueError, naming the argument, for what asks for other ranks than all, or for another engine's parts."""
    for name, value in given.items():
        if value is not None and value is not dist.group.WORLD:
            raise ValueError(
                f"zero.Init: {name} is not supported: parameters are partitioned over all ranks; leave it out"
            )


def _refuse_quantized(name: str, value: bool) -> None:
    if value:
        raise ValueError(f"zero.Init: {name} is not supported: weights travel as they are; leave it out")
