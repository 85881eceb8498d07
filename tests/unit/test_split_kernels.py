"""device.kernels: bf16 weights and the 16 bits that make their masters whole, against arithmetic on integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_part import adam
from partita import _core
from partita._core import AdamGroup, Segments
from partita.device import kernels
from torch import Tensor

SIZES = st.one_of(st.integers(0, 70), st.sampled_from([255, 256, 257, 65535, 65536, 65537]))
SEEDS = st.integers(0, 1000)
OFFSETS = st.integers(0, 5)
BITS = st.integers(0, 2**32 - 1)
# Upper halves: zeros, subnormals, the smallest normal, one, the largest finite, infinities, quiet and signalling NaNs.
UPPER = [0x0000, 0x0001, 0x007F, 0x0080, 0x3F80, 0x3F81, 0x7F7E, 0x7F7F, 0x7F80, 0x7FBF, 0x7FC0, 0x7FFF]
# Lower halves: nothing, the neighbours of a tie, ties, the neighbours of the next weight.
LOWER = [0x0000, 0x0001, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF]
EVERY_CLASS = [sign | upper << 16 | lower for sign in (0, 1 << 31) for upper in UPPER for lower in LOWER]

arithmetic = settings(max_examples=40, deadline=None)


def from_bits(bits: list[int]) -> Tensor:
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32).long() & 0xFFFFFFFF


def weights_of(master: Tensor) -> tuple[Tensor, Tensor]:
    """Upper 16 bits, rounded with ties away from zero, and the lower 16: as integers. Not for NaN."""
    bits = bits_of(master)
    return ((bits + 0x8000) & ~0xFFFF) >> 16, bits & 0xFFFF


def upper(params: Tensor) -> Tensor:
    return params.view(torch.int16).long() & 0xFFFF


def shifted(tensor: Tensor, offset: int) -> Tensor:
    """The same values at an address that is off by `offset` elements from what the allocator aligns."""
    base = torch.zeros(tensor.numel() + offset, dtype=tensor.dtype)
    base[offset:] = tensor
    return base[offset:]


def split(master: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
    params = shifted(torch.zeros(master.numel(), dtype=torch.bfloat16), offset)
    remainder = shifted(torch.full((master.numel(),), 77, dtype=torch.int16), offset)
    kernels.split_master(params, shifted(master, offset), remainder)
    return params, remainder


def join(params: Tensor, remainder: Tensor, offset: int = 0) -> Tensor:
    master = shifted(torch.full((params.numel(),), 77.0), offset)
    kernels.join_master(master, params, remainder)
    return master


def check_split(master: Tensor, offset: int = 0) -> None:
    params, remainder = split(master, offset)
    joined = join(params, remainder, offset)
    nan = master.isnan()
    high, low = weights_of(master)
    assert torch.equal(upper(params)[~nan], high[~nan])
    assert torch.equal((remainder.long() & 0xFFFF)[~nan], low[~nan])
    assert torch.equal(bits_of(joined)[~nan], bits_of(master)[~nan])
    assert bool(params[nan].isnan().all())
    assert bool((upper(params)[nan] & 0x40).bool().all()), "a signalling NaN"
    assert not remainder[nan].any()
    assert bool(joined[nan].isnan().all())
    alone = torch.zeros_like(params)
    kernels.split_master(alone, master)
    assert torch.equal(alone.view(torch.int16), params.view(torch.int16))


def test_every_class_of_numbers_is_rounded_away_from_zero_and_comes_back():
    """Zeros, subnormals, ties and their neighbours, infinities; a NaN stays one, the largest number becomes inf."""
    master = from_bits(EVERY_CLASS)
    assert master.isnan().sum() == 2 * 7 + 2 * 3 * 8
    check_split(master)
    largest = from_bits([0x7F7FFFFF])
    assert split(largest)[0].item() == float("inf")
    assert join(*split(largest)).item() == largest.item()


@arithmetic
@given(st.lists(BITS, max_size=100), OFFSETS)
def test_any_bits_come_back(bits, offset):
    check_split(from_bits(bits), offset)


@arithmetic
@given(SIZES, OFFSETS, SEEDS)
def test_any_size_comes_back(numel, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    check_split(from_bits(torch.randint(0, 2**32, (numel,), generator=generator).tolist()), offset)


def test_every_weight_comes_back_from_its_own_bits():
    """All 65,536 bf16 patterns with a remainder of zero: what a loaded checkpoint is."""
    params = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    joined = join(params, torch.zeros(params.numel(), dtype=torch.int16))
    assert torch.equal(bits_of(joined), upper(params) << 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_are_rounded_to_nearest_even(dtype):
    """As torch casts; they have no remainder."""
    master = torch.cat([torch.randn(100), torch.tensor([1.0, 1.0 + 2**-11, 1.0 + 3 * 2**-11, 65520.0, 1e-8])])
    params = torch.zeros(master.numel(), dtype=dtype)
    kernels.split_master(params, master)
    assert torch.equal(params, master.to(dtype))


# -- Adam

GROUPS = [AdamGroup(1e-2, 0.8, 0.99, 1e-6, 0.1, True), AdamGroup(3e-3, 0.9, 0.999, 1e-8, 0.0, False)]


def control(*, skip: bool = False, step: int = 1, grad_scale: float = 0.5) -> Tensor:
    memory = torch.zeros(_core.StepControl.nbytes, dtype=torch.uint8)
    _core.StepControl(grad_norm=0.0, grad_scale=grad_scale, skip=skip, step=step).write(memory.data_ptr())
    return memory


def random_master(numel: int, seed: int, magnitude: float = 1.0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * magnitude


@arithmetic
@given(SIZES, OFFSETS, st.sampled_from(list(kernels.DTYPES)), st.sampled_from([1e-30, 1.0, 1e30]), SEEDS)
def test_adam_with_a_remainder_has_the_bits_of_adam_with_a_master(numel, offset, grad_dtype, magnitude, seed):
    """Weights, masters and moments after three steps; in two groups with a gap between them that nobody touches."""
    cut = numel // 3
    rows = [(0, cut, 0), (cut + min(5, numel - cut), max(0, numel - cut - 5), 1)]
    segments = Segments([row for row in rows if row[1]])
    master = shifted(random_master(numel, seed, magnitude), offset)
    params, remainder = split(master, offset)
    split_params = shifted(params, offset)
    moments = [[torch.zeros(numel), torch.zeros(numel)] for _ in range(2)]
    for step in range(1, 4):
        common = {
            "grads": shifted(random_master(numel, seed + step).to(grad_dtype), offset),
            "segments": segments,
            "groups": GROUPS,
            "control": control(step=step),
        }
        whole = {"exp_avg": moments[0][0], "exp_avg_sq": moments[0][1], "params": params, "master": master}
        parted = {"exp_avg": moments[1][0], "exp_avg_sq": moments[1][1], "params": split_params, "master": None}
        adam(**common, **whole)
        adam(**common, **parted, remainder=remainder)
    assert torch.equal(split_params.view(torch.int16), params.view(torch.int16))
    assert torch.equal(bits_of(join(split_params, remainder)), bits_of(master))
    for a, b in zip(*moments, strict=True):
        assert torch.equal(a, b)


@arithmetic
@given(st.integers(1, 300), SEEDS)
def test_a_skipped_step_leaves_the_remainder(numel, seed):
    """N1."""
    params, remainder = split(random_master(numel, seed))
    before = params.clone(), remainder.clone()
    adam(
        **adam_arguments(numel, params=params, remainder=remainder, grads=torch.full((numel,), float("nan"))),
        control=control(skip=True),
    )
    assert torch.equal(params, before[0])
    assert torch.equal(remainder, before[1])


def adam_arguments(numel: int, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {name: torch.ones(numel) for name in ("grads", "exp_avg", "exp_avg_sq")}
    arguments |= {"master": None, "segments": Segments([(0, numel, 0)]), "groups": GROUPS}
    return {**arguments, **changes}


# -- refusals


def arguments_of(function: str) -> dict[str, Any]:
    params, remainder = split(torch.ones(8))
    if function == "adam":
        return {**adam_arguments(8, params=params, remainder=remainder), "control": control()}
    return {"params": params, "remainder": remainder, "master": torch.ones(8)}


CALLS = {"split_master": kernels.split_master, "join_master": kernels.join_master, "adam": adam}
WRONG: dict[str, tuple[Tensor, str]] = {
    "dtype": (torch.ones(8, dtype=torch.float64), "float64"),
    "size": (torch.ones(7, dtype=torch.int16), r"\b7\b"),
    "device": (torch.ones(8, dtype=torch.int16, device="meta"), "meta"),
    "strides": (torch.ones(16, dtype=torch.int16)[::2], r"strides \(2,\)"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("function", ["split_master", "join_master", "adam"])
def test_a_wrong_remainder_is_named(function, kind):
    """Promise 7."""
    wrong, says = WRONG[kind]
    with pytest.raises((TypeError, ValueError), match=says) as error:
        CALLS[function](**{**arguments_of(function), "remainder": wrong})
    assert "remainder" in str(error.value)


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("function", ["split_master", "join_master"])
@pytest.mark.parametrize("name", ["params", "master"])
def test_wrong_weights_are_named(function, name, kind):
    """Promise 7."""
    wrong, says = WRONG[kind]
    dtype = {"params": torch.bfloat16, "master": torch.float32}[name]
    if kind != "dtype":
        wrong = torch.ones(16, dtype=dtype)[::2] if kind == "strides" else wrong.to(dtype)
    with pytest.raises((TypeError, ValueError), match=says):
        CALLS[function](**{**arguments_of(function), name: wrong})


@pytest.mark.parametrize(
    ("function", "changes", "says"),
    [
        ("split_master", {"params": torch.ones(8, dtype=torch.float16)}, "only bf16.*remainder"),
        ("split_master", {"master": torch.ones(8, dtype=torch.bfloat16)}, "master weights must be f32"),
        ("join_master", {"params": torch.ones(8, dtype=torch.float16)}, "bf16 parameters and their remainder"),
        ("join_master", {"master": torch.ones(8, dtype=torch.bfloat16)}, "master weights must be f32"),
        ("adam", {"params": torch.ones(8, dtype=torch.float16)}, "remainder.*bf16|bf16.*remainder"),
        ("adam", {"params": None}, "remainder.*bf16|bf16.*remainder"),
        ("adam", {"master": torch.ones(8)}, "remainder"),
        ("adam", {"remainder": None}, "neither master weights nor a remainder"),
    ],
)
def test_what_does_not_go_together_is_refused(function, changes, says):
    """Promise 7: only bf16 weights are split, and a master beside a remainder is one too many."""
    with pytest.raises((TypeError, ValueError), match=says):
        CALLS[function](**{**arguments_of(function), **changes})


# -- pack with a factor in memory


@arithmetic
@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=4),
    st.sampled_from(list(kernels.DTYPES)),
    st.sampled_from(list(kernels.DTYPES)),
    st.sampled_from([1.0, 0.5, 1 / 3]),
    st.sampled_from([1.0, 65536.0, 0.75]),
    st.booleans(),
    SEEDS,
)
def test_a_factor_in_memory_multiplies_the_scale(sizes, to, from_, scale, factor, accumulate, seed):
    """The same bits as one scale that is their product."""
    sources = [random_master(n, seed + i).to(from_) for i, n in enumerate(sizes)]
    spans, offsets = [kernels.span(s) for s in sources], [sum(sizes[:i]) for i in range(len(sizes))]
    packed = [random_master(sum(sizes), seed + 100).to(to) for _ in range(2)]
    kernels.pack(packed[0], spans, offsets, scale=scale * factor, accumulate=accumulate)
    in_memory = torch.tensor([factor], dtype=torch.float64)
    kernels.pack(packed[1], spans, offsets, scale=scale, factor=in_memory, accumulate=accumulate)
    assert torch.equal(packed[0], packed[1])
    if not accumulate:
        sources_together = torch.cat([s.float() for s in sources])
        torch.testing.assert_close(packed[1].float(), (sources_together * (scale * factor)).to(to).float())


@pytest.mark.parametrize(
    ("factor", "says"),
    [
        (torch.ones(1), "one float64.*float32"),
        (torch.ones(2, dtype=torch.float64), "one float64.*2 x"),
        (torch.ones(1, dtype=torch.float64, device="meta"), "factor.*meta.*destination.*cpu"),
    ],
)
def test_a_wrong_factor_is_named(factor, says):
    """Promise 7."""
    with pytest.raises((TypeError, ValueError), match=says):
        kernels.pack(torch.zeros(3), [kernels.span(torch.ones(3))], [0], scale=1.0, factor=factor, accumulate=False)
