"""partita.device.kernels: what it refuses and how it says so, and that tensors get through to the right arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_part import adam
from partita import _core
from partita._core import AdamGroup, Segments, Span
from partita.device import kernels
from torch import Tensor

DTYPES = st.sampled_from(sorted(kernels.DTYPES, key=str))
SIZES = st.one_of(st.integers(0, 70), st.sampled_from([255, 256, 257, 16384, 16385, 65536, 65537]))
SEEDS = st.integers(0, 1000)
SCALES = st.sampled_from([1.0, 0.5, 1 / 3, -2.0])

arithmetic = settings(max_examples=40, deadline=None)


def values(numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)).to(dtype)


def shifted(tensor: Tensor, offset: int) -> Tensor:
    """The same values at an address that is off by `offset` elements from what the allocator aligns."""
    base = torch.zeros(tensor.numel() + offset, dtype=tensor.dtype)
    base[offset:] = tensor
    return base[offset:]


def control(*, grad_scale: float = 1.0, skip: bool = False, step: int = 1) -> Tensor:
    memory = torch.zeros(_core.StepControl.nbytes, dtype=torch.uint8)
    _core.StepControl(grad_norm=0.0, grad_scale=grad_scale, skip=skip, step=step).write(memory.data_ptr())
    return memory


# -- gradients that move


def test_moved_gradients_are_read_and_nothing_else_changes():
    arguments = adam_arguments()
    groups, memory = arguments.pop("groups"), arguments.pop("control")
    grads = [torch.full((8,), 3.0), torch.full((8,), -3.0)]
    masters = [torch.ones(8), torch.ones(8)]
    moments = [torch.zeros(8) for _ in range(4)]
    parts = [
        kernels.adam_part(
            grads=torch.full((8,), 7.0),
            master=masters[i],
            exp_avg=moments[2 * i],
            exp_avg_sq=moments[2 * i + 1],
            params=None,
            segments=arguments["segments"],
        )
        for i in range(2)
    ]
    kernels.move_grads(parts, grads)
    kernels.adam(parts, groups, memory)
    assert masters[0].tolist() != masters[1].tolist()
    assert torch.allclose(moments[0], torch.full((8,), 0.3))
    assert torch.allclose(moments[2], torch.full((8,), -0.3))


@pytest.mark.parametrize(
    ("grad", "words"),
    [
        (torch.ones(7), "7 elements, its part 8"),
        (torch.ones(8, device="meta"), "on other devices"),
        (torch.ones(16)[::2], "not contiguous"),
        (torch.zeros(8).to_sparse(), "layout"),
        (torch._neg_view(torch.ones(8)), "lazy negation"),
    ],
)
def test_gradients_that_cannot_move_there_are_refused(grad, words):
    """And the parts read those that they read before."""
    arguments = adam_arguments()
    groups, memory = arguments.pop("groups"), arguments.pop("control")
    first, second = (kernels.adam_part(**arguments) for _ in range(2))
    with pytest.raises(ValueError, match=words):
        kernels.move_grads([first, second], [torch.ones(8), grad])
    kernels.adam([first, second], groups, memory)
    with pytest.raises(ValueError, match="as many"):
        _core.move_grads([first.native], [0, 0], [8, 8])


# -- refusals


def adam_arguments(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {name: torch.ones(8) for name in ("grads", "master", "exp_avg", "exp_avg_sq", "params")}
    group = AdamGroup(1e-3, 0.9, 0.999, 1e-8, 0.0, True)
    return {**arguments, "segments": Segments([(0, 8, 0)]), "groups": [group], "control": control(), **changes}


def bad(kind: str) -> Tensor:
    match kind:
        case "dtype":
            return torch.ones(8, dtype=torch.float64)
        case "device":
            return torch.ones(8, device="meta")
        case "strides":
            return torch.ones(16)[::2]
        case _:
            return torch.ones(7)


SAYS = {"dtype": "float64", "device": "meta", "strides": r"strides \(2,\)", "size": r"\b7\b"}


@pytest.mark.parametrize("kind", SAYS)
@pytest.mark.parametrize("name", ["grads", "master", "exp_avg", "exp_avg_sq", "params"])
def test_adam_names_the_buffer_and_what_is_wrong_with_it(name, kind):
    """Promise 7."""
    with pytest.raises((TypeError, ValueError), match=SAYS[kind]) as error:
        adam(**adam_arguments(**{name: bad(kind)}))
    assert name in str(error.value) or name == "master"  # a master of another size makes all others differ from it


@pytest.mark.parametrize("kind", SAYS)
@pytest.mark.parametrize("name", ["destination", "source"])
def test_cast_names_the_tensor_and_what_is_wrong_with_it(name, kind):
    """Promise 7."""
    tensors = {"destination": torch.zeros(8), "source": torch.zeros(8), name: bad(kind)}
    with pytest.raises((TypeError, ValueError), match=SAYS[kind]) as error:
        kernels.cast(**tensors)
    assert name in str(error.value) or kind == "size"


@pytest.mark.parametrize("kind", ["dtype", "device", "strides"])
def test_span_pack_and_norm_name_what_is_wrong(kind):
    """Promise 7."""
    calls = [
        lambda: kernels.span(bad(kind)),
        lambda: kernels.pack(bad(kind), [], [], scale=1.0, accumulate=False),
        lambda: kernels.norm_part(bad(kind), Segments([(0, 8, 0)])),
    ]
    for call, name in zip(calls, ("tensor", "destination", "values"), strict=True):
        with pytest.raises((TypeError, ValueError), match=SAYS[kind]) as error:
            call()
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("total", "says"),
    [
        (torch.zeros(1), "float32"),
        (torch.zeros(2, dtype=torch.float64), "2 x"),
        (torch.zeros(1, dtype=torch.float64, device="meta"), "total.*meta"),
    ],
)
def test_the_sum_of_squares_goes_into_one_float64_in_reach(total, says):
    """Promise 7; a tensor without memory is an error, not an access to address 0."""
    with pytest.raises((TypeError, ValueError), match=says):
        kernels.sum_of_squares(total, [kernels.norm_part(torch.ones(4), Segments([(0, 4, 0)]))])


@pytest.mark.parametrize(
    "memory",
    [
        torch.zeros(3, dtype=torch.uint8),
        torch.zeros(_core.StepControl.nbytes),
        torch.zeros(_core.StepControl.nbytes, dtype=torch.uint8, device="meta"),
    ],
)
def test_adam_reads_its_control_block_only_from_memory_that_can_hold_it(memory):
    """Promise 7."""
    with pytest.raises((TypeError, ValueError), match="control"):
        adam(**adam_arguments(control=memory))


def test_parts_on_another_device_are_refused():
    """Promise 7: neither device would read the other's addresses."""
    elsewhere = torch.device("cuda", 0)
    arguments = adam_arguments()
    groups, memory = arguments.pop("groups"), arguments.pop("control")
    part = kernels.Part(kernels.adam_part(**arguments).native, elsewhere)
    with pytest.raises(ValueError, match="control is on device 'cpu' but a part is on 'cuda:0'"):
        kernels.adam([part], groups, memory)
    norm = kernels.Part(kernels.norm_part(torch.ones(8), Segments([(0, 8, 0)])).native, elsewhere)
    with pytest.raises(ValueError, match="total is on device 'cpu' but a part is on 'cuda:0'"):
        kernels.sum_of_squares(torch.zeros(1, dtype=torch.float64), [norm])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: adam(**adam_arguments(segments=Segments([(0, 9, 0)]))), "segments"),
        (lambda: adam(**adam_arguments(segments=Segments([(0, 8, 1)]))), "group 1 of 1"),
        (lambda: adam(**adam_arguments(exp_avg=torch.ones(8).half())), "moments must be f32"),
        (lambda: Segments([(-1, 4, 0)]), "offset -1"),
        (lambda: Segments([(0, 4, 0), (3, 4, 0)]), "offset 3"),
        (lambda: Segments([(0, 4, -1)]), "group -1"),
        (lambda: Span(0, -1, _core.DType.f32), "-1"),
        (lambda: _pack_ones(at=[6]), "offset 6"),
        (lambda: _pack_ones(at=[-1]), "offset -1"),
        (lambda: _pack_ones(at=[0, 3]), "1 spans but 2 offsets"),
        (lambda: _pack_ones(at=[2**62]), "offset 4611686018427387904"),
    ],
)
def test_the_core_refuses_what_lies_outside_and_says_where(call, says):
    """Promise 7: nothing is read or written out of bounds."""
    with pytest.raises(ValueError, match=says):
        call()


def _pack_ones(at: list[int]) -> None:
    source = torch.ones(3)
    kernels.pack(torch.zeros(8), [kernels.span(source)], at, scale=1.0, accumulate=False)


# -- arithmetic


@arithmetic
@given(SIZES, DTYPES, DTYPES, st.integers(0, 5), SCALES, st.booleans(), SEEDS)
def test_cast_is_computed_in_fp32_and_rounded_once(numel, to, from_, offset, scale, accumulate, seed):
    source = shifted(values(numel, from_, seed), offset)
    before = values(numel, to, seed + 1)
    destination = shifted(before, offset)
    kernels.cast(destination, source, scale=scale, accumulate=accumulate)
    product = source.float() * torch.tensor(scale, dtype=torch.float32)
    expected = (before.float() + product if accumulate else product).to(to)
    # where scale and addition are one fused operation, the sum is rounded once less
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[to] if accumulate else 0.0
    torch.testing.assert_close(destination, expected, rtol=tolerance, atol=tolerance)


@arithmetic
@given(st.lists(st.integers(0, 300), max_size=6), DTYPES, DTYPES, st.integers(0, 40), st.booleans(), SEEDS)
def test_pack_places_tensors_and_leaves_the_gaps_alone(sizes, to, from_, gap, accumulate, seed):
    sources = [values(n, from_, seed + i) for i, n in enumerate(sizes)]
    offsets = [gap + sum(sizes[:i]) + gap * i for i in range(len(sizes))]
    destination = values(sum(sizes) + gap * (len(sizes) + 1), to, seed + 100)
    expected = destination.clone()
    for source, offset in zip(sources, offsets, strict=True):
        part = expected[offset : offset + source.numel()]
        part.copy_((part.float() + source.float()) if accumulate else source)
    kernels.pack(destination, [kernels.span(s) for s in sources], offsets, scale=1.0, accumulate=accumulate)
    assert torch.equal(destination, expected)


@arithmetic
@given(st.integers(0, 300), DTYPES, st.booleans())
def test_a_span_without_data_packs_as_zeros(numel, dtype, accumulate):
    """G11: a parameter without a gradient."""
    destination = torch.ones(numel + 2, dtype=dtype)
    kernels.pack(destination, [Span(0, numel, _core.DType.f32)], [1], scale=1.0, accumulate=accumulate)
    assert destination.tolist() == [1.0, *([1.0 if accumulate else 0.0] * numel), 1.0]


@arithmetic
@given(SIZES, DTYPES, st.integers(0, 5), SEEDS, st.data())
def test_the_sum_of_squares_reads_segments_only(numel, dtype, offset, seed, data):
    """G8: padding, NaN here, never reaches a norm."""
    cuts = sorted(data.draw(st.lists(st.integers(0, numel), min_size=4, max_size=4)))
    segments = [(cuts[0], cuts[1] - cuts[0], 0), (cuts[2], cuts[3] - cuts[2], 1)]
    real = torch.zeros(numel, dtype=torch.bool)
    for begin, count, _ in segments:
        real[begin : begin + count] = True
    tensor = values(numel, dtype, seed)
    padded = shifted(torch.where(real, tensor, torch.tensor(float("nan"), dtype=dtype)), offset)
    total = torch.tensor([3.0], dtype=torch.float64)
    kernels.sum_of_squares(total, [kernels.norm_part(padded, Segments(segments))])
    torch.testing.assert_close(total.item(), 3.0 + tensor[real].double().square().sum().item(), rtol=1e-12, atol=0.0)


def round_weights(master: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Masters as parameters: to nearest; of two equally near, bf16 takes the larger magnitude, others the even one."""
    if dtype != torch.bfloat16:
        return master.to(dtype)
    return ((master.view(torch.int32) + 0x8000) & -0x10000).view(torch.float32).to(dtype)


@arithmetic
@given(SIZES, DTYPES, DTYPES, st.integers(0, 5), st.booleans(), st.sampled_from([0.0, 0.1]), SEEDS)
def test_adam_equals_torch_over_three_steps(numel, grad_dtype, param_dtype, offset, decoupled, decay, seed):
    """O1, O4: L2 and decoupled decay; gradients in any dtype; 16-bit parameters are their master rounded."""
    make = torch.optim.AdamW if decoupled else torch.optim.Adam
    reference = torch.nn.Parameter(values(numel, torch.float32, seed))
    optimizer = make([reference], lr=1e-2, betas=(0.8, 0.99), eps=1e-6, weight_decay=decay)
    master = shifted(reference.detach().clone(), offset)
    moments = [torch.zeros(numel), torch.zeros(numel)]
    params = shifted(torch.zeros(numel, dtype=param_dtype), offset)
    for step in range(1, 4):
        grads = values(numel, grad_dtype, seed + step)
        reference.grad = grads.float() * 0.5
        optimizer.step()
        adam(
            grads=shifted(grads, offset),
            master=master,
            exp_avg=moments[0],
            exp_avg_sq=moments[1],
            params=params,
            segments=Segments([(0, numel, 0)] if numel else []),
            groups=[AdamGroup(1e-2, 0.8, 0.99, 1e-6, decay, decoupled)],
            control=control(grad_scale=0.5, step=step),
        )
    torch.testing.assert_close(master, reference.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(params, round_weights(master, param_dtype))


@arithmetic
@given(st.integers(1, 300), SEEDS)
def test_a_skipped_step_changes_no_bit(numel, seed):
    """N1."""
    buffers = {n: values(numel, torch.float32, seed + i) for i, n in enumerate(("master", "exp_avg", "exp_avg_sq"))}
    before = {n: t.clone() for n, t in buffers.items()}
    params = torch.full((numel,), 7.0, dtype=torch.bfloat16)
    arguments = adam_arguments(**buffers, params=params, segments=Segments([(0, numel, 0)]))
    adam(**{**arguments, "grads": torch.full((numel,), float("inf")), "control": control(skip=True)})
    assert all(torch.equal(buffers[n], before[n]) for n in buffers)
    assert torch.equal(params, torch.full_like(params, 7.0))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", list(kernels.DTYPES))
def test_is_finite_sees_a_single_bad_element(dtype, value):
    tensor = torch.ones(5, 7, dtype=dtype)
    assert kernels.is_finite(tensor.t())
    tensor[3, 2] = value
    assert not kernels.is_finite(tensor)
    assert not kernels.is_finite(tensor.t())


def test_adopt_written_takes_only_what_is_not_the_rounded_master():
    """O3: an element that others did not touch keeps the master's precision."""
    master = torch.tensor([1.0 + 2**-12, 2.0 + 2**-12, 3.0])
    params = master.bfloat16()
    params[1] = 5.0
    kernels.adopt_written(master, params)
    assert master.tolist() == [1.0 + 2**-12, 5.0, 3.0]
