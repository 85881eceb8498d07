"""train = micro x accumulation x world size, from whatever part of it the config gives."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from partita.config import BatchSizes, ConfigError, resolve_batch_sizes

sizes = st.integers(min_value=1, max_value=10_000)


@given(micro=sizes, accumulation=sizes, world_size=sizes)
def test_any_two_or_three_consistent_sizes_resolve_to_the_same(micro: int, accumulation: int, world_size: int) -> None:
    train = micro * accumulation * world_size
    complete: dict[str, Any] = {"train": train, "micro": micro, "accumulation": accumulation}
    expected = BatchSizes(train, micro, accumulation, world_size)
    assert resolve_batch_sizes(**complete, world_size=world_size) == expected
    for dropped in complete:
        assert resolve_batch_sizes(**{**complete, dropped: None}, world_size=world_size) == expected


@given(st.none() | sizes, st.none() | sizes, st.none() | sizes, sizes)
def test_what_resolves_is_consistent_and_keeps_what_was_given(
    train: int | None, micro: int | None, accumulation: int | None, world_size: int
) -> None:
    try:
        resolved = resolve_batch_sizes(train=train, micro=micro, accumulation=accumulation, world_size=world_size)
    except ConfigError:
        assert train is not None  # only a train batch can contradict or be indivisible
        assert train % ((micro or 1) * (accumulation or 1) * world_size) != 0 or (micro and accumulation)
        return
    assert resolved.train == resolved.micro * resolved.accumulation * resolved.world_size
    assert (train or resolved.train, micro or resolved.micro) == (resolved.train, resolved.micro)
    assert (accumulation or resolved.accumulation, world_size) == (resolved.accumulation, resolved.world_size)


@pytest.mark.parametrize(
    ("train", "micro", "accumulation", "world_size", "expected"),
    [
        (None, None, None, 4, (4, 1, 1)),
        (32, None, None, 4, (32, 8, 1)),
        (None, 6, None, 4, (24, 6, 1)),
        (None, None, 5, 4, (20, 1, 5)),
        (32, 4, None, 4, (32, 4, 2)),
        (32, None, 4, 4, (32, 2, 4)),
        (None, 3, 2, 4, (24, 3, 2)),
    ],
)
def test_missing_sizes(
    train: int | None, micro: int | None, accumulation: int | None, world_size: int, expected: tuple[int, int, int]
) -> None:
    resolved = resolve_batch_sizes(train=train, micro=micro, accumulation=accumulation, world_size=world_size)
    assert resolved == BatchSizes(*expected, world_size)


@pytest.mark.parametrize(
    ("train", "micro", "accumulation", "world_size", "named"),
    [
        (
            32,
            4,
            3,
            2,
            [
                "train_batch_size = 32 (from the config)",
                "train_micro_batch_size_per_gpu = 4 (from the config)",
                "gradient_accumulation_steps = 3 (from the config)",
                "world size = 2 (number of ranks)",
                "32 is not 4 x 3 x 2 = 24",
                "set train_batch_size to 24",
            ],
        ),
        (
            32,
            5,
            None,
            2,
            [
                "gradient_accumulation_steps = 3.2 (derived: 32 / (5 x 2))",
                "world size = 2 (number of ranks)",
                "set train_batch_size to 30 or 40 (multiples of 10)",
                "change train_micro_batch_size_per_gpu",
            ],
        ),
        (
            7,
            None,
            None,
            2,
            [
                "gradient_accumulation_steps = 1 (default",
                "train_micro_batch_size_per_gpu = 3.5 (derived: 7 / (1 x 2))",
                "set train_batch_size to 6 or 8",
            ],
        ),
        (
            2,
            None,
            3,
            4,
            ["gradient_accumulation_steps = 3 (from the config)", "set train_batch_size to 12 (multiples of 12)"],
        ),
        (None, 0, None, 2, ["train_micro_batch_size_per_gpu must be at least 1", "= 0 (from the config)"]),
        (None, None, None, 0, ["world size must be at least 1", "world size = 0 (number of ranks)"]),
    ],
)
def test_errors_print_all_numbers_and_a_remedy(
    train: int | None, micro: int | None, accumulation: int | None, world_size: int, named: list[str]
) -> None:
    with pytest.raises(ConfigError) as raised:
        resolve_batch_sizes(train=train, micro=micro, accumulation=accumulation, world_size=world_size)
    for text in named:
        assert text in str(raised.value)
