"""The arithmetic of batch sizes: train = micro x accumulation x world size."""

from __future__ import annotations

from dataclasses import dataclass

from partita.config.errors import ConfigError

_TRAIN = "train_batch_size"
_MICRO = "train_micro_batch_size_per_gpu"
_ACCUMULATION = "gradient_accumulation_steps"
_WORLD = "world size"


@dataclass(frozen=True)
class BatchSizes:
    """Sample counts of one optimizer step; `train == micro * accumulation * world_size` always holds."""

    train: int
    micro: int
    accumulation: int
    world_size: int


def resolve_batch_sizes(
    *, train: int | None, micro: int | None, accumulation: int | None, world_size: int
) -> BatchSizes:
    """Complete the sizes that the config gives.

    What is missing follows from the rest. Where that leaves a choice, accumulation is 1 first, then the micro-batch
    is 1: a train batch alone is split over the ranks, and no size at all means one sample per rank and step.

    Args:
        train: samples per optimizer step over all ranks.
        micro: samples per forward pass of one rank.
        accumulation: micro-batches per rank and optimizer step.
        world_size: number of data-parallel ranks.

    Raises:
        ConfigError: a size below 1, sizes that contradict each other, or a train batch that cannot be split evenly.
    """
    given = {_TRAIN: train, _MICRO: micro, _ACCUMULATION: accumulation}
    numbers = [f"{key} = {value} (from the config)" for key, value in given.items() if value is not None]
    numbers.append(f"{_WORLD} = {world_size} (number of ranks)")
    for key, value in {**given, _WORLD: world_size}.items():
        if value is not None and value < 1:
            raise _error(f"{key} must be at least 1", numbers, f"raise {key} to 1 or more")

    if train is None:
        micro, accumulation = micro or 1, accumulation or 1
        return BatchSizes(micro * accumulation * world_size, micro, accumulation, world_size)
    if micro is not None and accumulation is not None:
        product = micro * accumulation * world_size
        if train != product:
            raise _error(
                f"{_TRAIN} is not {_MICRO} x {_ACCUMULATION} x {_WORLD}: "
                f"{train} is not {micro} x {accumulation} x {world_size} = {product}",
                numbers,
                f"set {_TRAIN} to {product}, or leave one of the three keys out",
            )
        return BatchSizes(train, micro, accumulation, world_size)
    if micro is not None:
        accumulation = _divide(train, micro, world_size, _ACCUMULATION, _MICRO, numbers)
        return BatchSizes(train, micro, accumulation, world_size)
    if accumulation is None:
        accumulation = 1
        numbers.append(f"{_ACCUMULATION} = 1 (default: neither it nor {_MICRO} is in the config)")
    micro = _divide(train, accumulation, world_size, _MICRO, _ACCUMULATION, numbers)
    return BatchSizes(train, micro, accumulation, world_size)


def _divide(train: int, factor: int, world_size: int, wanted: str, factor_key: str, numbers: list[str]) -> int:
    """train / (factor x world size) for the key that is `wanted`."""
    divisor = factor * world_size
    quotient, remainder = divmod(train, divisor)
    if remainder == 0:
        return quotient
    nearest = " or ".join(str(count * divisor) for count in (quotient, quotient + 1) if count > 0)
    derived = f"{wanted} = {train / divisor:.4g} (derived: {train} / ({factor} x {world_size}))"
    raise _error(
        f"{_TRAIN} cannot be split evenly: {wanted} would not be a whole number",
        [*numbers, derived],
        f"set {_TRAIN} to {nearest} (multiples of {divisor}), or change {factor_key} or the number of ranks",
    )


def _error(problem: str, numbers: list[str], remedy: str) -> ConfigError:
    return ConfigError("\n".join([problem, *(f"  {number}" for number in numbers), f"To fix it: {remedy}."]))
