"""What happens to a gradient between autograd and the optimizer: layouts, types, settings that must not change it."""

from __future__ import annotations

from functools import partial
from typing import Any

import inside
import partita
import pytest
import torch
from communicators import RecordingCommunicator, communicating_through
from partita.units import TakenGradient
from reference import (
    DTYPES,
    ODD_MODEL,
    PRECISIONS,
    Training,
    assert_equal_runs,
    backward_of,
    numbers,
    sgd_config,
    tokens_of,
    train_in_engine,
    train_plain,
)
from support import is_mapped, make_model
from torch import Tensor, nn

STAGES = (0, 1, 2, 3)


def _leaves(config: dict[str, Any], backward: str, create_graph: bool) -> None:
    model = make_model()
    engine = partita.Engine(model=model, config=config)
    for step in range(2):
        for i in range(engine.gradient_accumulation_steps()):
            loss = engine(*tokens_of(step, i))
            backward_of(engine, backward)(loss, **({"create_graph": True} if create_graph else {}))
            assert {type(p.grad) for p in model.parameters()} == {TakenGradient}
            engine.step()
            for parameter in model.parameters():
                assert parameter.is_leaf and parameter.requires_grad and parameter.grad is None
            for unit in inside.units(engine):
                for name, value in vars(unit).items():
                    if isinstance(value, Tensor):
                        assert value.grad_fn is None and not value.requires_grad, name
    engine.destroy()


@pytest.mark.pairwise
@pytest.mark.parametrize(
    ("backward", "create_graph"), [("engine.backward", False), ("loss.backward", False), ("loss.backward", True)]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.filterwarnings("ignore:Using backward")
def test_flat_buffers_keep_no_autograd_history(ranks, stage, precision, backward, create_graph):
    """G14. And `.grad` has no values as soon as backward has ended."""
    config = sgd_config(stage=stage, gradient_accumulation_steps=2, **PRECISIONS[precision])
    ranks(2).run(_leaves, config, backward, create_graph)


# setting -> (config, precision that the result has)
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "fp16 communication": ({"communication_data_type": "fp16"}, "fp16"),
    "bf16 communication": ({"communication_data_type": "bf16"}, "bf16"),
    "bf16 accumulation": ({"data_types": {"grad_accum_dtype": "bf16"}}, "bf16"),
    "bf16 accumulation, fp32 communication": (
        {"data_types": {"grad_accum_dtype": "bf16"}, "communication_data_type": "fp32"},
        "bf16",
    ),
    "prescaled": ({"prescale_gradients": True}, "fp32"),
    "predivided": ({"prescale_gradients": True, "gradient_predivide_factor": 3.0}, "fp32"),
    "predivided, fp16 communication": (
        {"prescale_gradients": True, "gradient_predivide_factor": 3.0, "communication_data_type": "fp16"},
        "fp16",
    ),
    "all-reduced": ({"reduce_scatter": False}, "fp32"),
    "all-reduced, without overlap": ({"reduce_scatter": False, "overlap_comm": False}, "fp32"),
    "small gathers": ({"allgather_bucket_size": 60}, "fp32"),
}


@pytest.mark.pairwise
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("stage", "accumulation"), [(0, 1), (1, 2), (2, 1), (2, 2), (3, 2)])
def test_the_way_of_a_gradient_does_not_change_it(ranks, stage, accumulation, setting):
    """On 3 ranks, so that a factor of the world size cannot hide behind a power of two."""
    changes, precision = SETTINGS[setting]
    config = sgd_config(stage=stage, gradient_accumulation_steps=accumulation, **changes)
    runs = ranks(3).run(train_in_engine, ODD_MODEL, config)
    assert_equal_runs(runs, train_plain(ODD_MODEL, 3 * accumulation), precision)


@pytest.mark.pairwise
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("changes", [{"communication_data_type": "fp32"}, {"prescale_gradients": True}], ids=str)
@pytest.mark.parametrize("stage", STAGES)
def test_the_way_of_a_16_bit_gradient_does_not_change_it(ranks, stage, changes, precision):
    """The same for 16-bit parameters."""
    config = sgd_config(stage=stage, **changes, **PRECISIONS[precision])
    runs = ranks(2).run(train_in_engine, ODD_MODEL, config)
    assert_equal_runs(runs, train_plain(ODD_MODEL, 2, DTYPES[precision]), precision)


def _dtypes_on_the_way(config: dict[str, Any]) -> set[tuple[str, torch.dtype]]:
    """(collective, dtype) of one step's gradients and parameters.

    What ranks tell each other besides is in float64, and buffers are broadcast.
    """
    with communicating_through(RecordingCommunicator) as recorder:
        engine = partita.Engine(model=make_model(), config=config)
        recorder.events.clear()
        for i in range(engine.gradient_accumulation_steps()):
            engine.backward(engine(*tokens_of(0, i)))
            engine.step()
        engine.destroy()
    launches = recorder.launches() + (recorder.beside.launches() if recorder.beside else [])
    return {launch for launch in launches if launch[0] != "broadcast" and launch[1] is not torch.float64}


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("changes", "accumulation", "reduced", "gathered"),
    [
        ({}, 1, F32, F32),
        ({"communication_data_type": "bf16"}, 1, BF16, F32),
        ({"communication_data_type": "fp16"}, 2, F16, F32),
        ({"bf16": {"enabled": True}}, 1, BF16, BF16),
        ({"bf16": {"enabled": True}}, 2, F32, BF16),
        ({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}}, 2, BF16, BF16),
        ({"bf16": {"enabled": True}, "communication_data_type": "fp32"}, 1, F32, BF16),
    ],
)
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_travel_in_the_type_that_was_asked_for(
    ranks, transport, stage, changes, accumulation, reduced, gathered
):
    """`communication_data_type`, else the type they are accumulated in, which is fp32 for several micro-batches."""
    expected = {("all_reduce", reduced)} if stage == 0 else {("reduce_scatter", reduced)}
    if stage and not is_mapped(stage, transport):
        expected.add(("all_gather", gathered))
    config = sgd_config(stage=stage, gradient_accumulation_steps=accumulation, **changes)
    assert ranks(2).run(_dtypes_on_the_way, config) == [expected] * 2


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_reduce_scatter_false_reduces_whole_buffers(ranks, transport, stage):
    """`reduce_scatter` false takes the other collective."""
    config = sgd_config(stage=stage, reduce_scatter=False)
    expected = {("all_reduce", F32)} | (set() if is_mapped(stage, transport) else {("all_gather", F32)})
    assert ranks(2).run(_dtypes_on_the_way, config) == [expected] * 2


def _large_gradient(config: dict[str, Any]) -> tuple[int, float | None]:
    """Skipped steps and norm for one weight whose gradient is 40000 on every rank."""
    engine = partita.Engine(model=nn.Linear(1, 1, bias=False), config=config)
    engine.backward(engine(torch.full((1, 1), 40000.0)).sum())
    engine.step()
    result = engine.skipped_steps, engine.get_global_grad_norm()
    engine.destroy()
    return result


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, False),
        ({"prescale_gradients": True}, True),
        ({"prescale_gradients": True, "gradient_predivide_factor": 4.0}, True),
        ({"prescale_gradients": True, "gradient_predivide_factor": 1.2}, False),
    ],
)
@pytest.mark.parametrize("stage", STAGES)
def test_prescaled_gradients_are_divided_before_they_are_summed(ranks, stage, changes, fits):
    """Two times 40000 is beyond float16; two times 20000 is not."""
    results = ranks(2).run(_large_gradient, sgd_config(stage=stage, communication_data_type="fp16", **changes))
    if fits:
        assert results == [(0, 40000.0)] * 2
    else:
        assert [skipped for skipped, _ in results] == [1, 1]


class OddGradient(torch.autograd.Function):
    """The sum of a matrix times a vector; its gradient with respect to the matrix comes expanded or transposed."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kind, ctx.rows = kind, weight.shape[0]
        return (weight @ x).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        whole = (grad * x).expand(ctx.rows, -1)
        return (whole if ctx.kind == "expanded" else whole.t().contiguous().t()), None, None


class OddGradients(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.weight = nn.Parameter(torch.randn(3, 5))
        self.table = nn.Embedding(7, 5, sparse=kind.startswith("sparse"))
        self.conv = nn.Conv2d(3, 4, 2)
        if kind == "channels_last":
            self.to(memory_format=torch.channels_last)
        if kind == "replaced by a hook":
            self.weight.register_post_accumulate_grad_hook(_transpose_memory)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.table((x[:, 0] * 3).abs().long() % 7)
        image = x.expand(3, *x.shape)[None].to(self.conv.weight.dtype)
        if self.kind == "channels_last":
            image = image.contiguous(memory_format=torch.channels_last)
        if self.kind == "sparse and dense":
            rows = rows + self.table.weight.sum(0)
        odd = OddGradient.apply(self.weight, x[0].to(self.weight.dtype), self.kind)
        return (odd + odd * odd + rows.square().sum() + self.conv(image).square().mean()).float()


def _transpose_memory(parameter: Tensor) -> None:
    parameter.grad = parameter.grad.t().contiguous().t()


def odd_gradient_micro_batch(forward: Any, backward: Any, step: int, index: int) -> None:
    loss = forward(numbers(step, index, 4, 5))
    backward(loss * 0.1)


KINDS = ["expanded", "transposed", "channels_last", "sparse", "sparse and dense", "replaced by a hook"]


@pytest.mark.pairwise
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("stage", "precision"), [(0, "bf16"), (1, "fp32"), (2, "bf16"), (2, "fp32"), (3, "fp32")])
def test_gradients_of_any_layout(ranks, stage, precision, kind):
    """G15. Sparse ones are densified."""
    training = Training(partial(OddGradients, kind), odd_gradient_micro_batch)
    config = sgd_config(stage=stage, gradient_accumulation_steps=2, reduce_bucket_size=40, **PRECISIONS[precision])
    runs = ranks(2).run(train_in_engine, training, config)
    assert_equal_runs(runs, train_plain(training, 4, DTYPES[precision]), precision)


def _gradient_in_other_dtype(stage: int, dtype: torch.dtype) -> float | None:
    """The norm of a gradient of 1 + 2**-12 for a bf16 parameter, which bf16 would round to 1."""
    config = sgd_config(stage=stage, bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"})
    model = nn.Linear(1, 1, bias=False)
    engine = partita.Engine(model=model, config=config)
    model.weight.grad_dtype = dtype
    engine(torch.ones(1, 1, dtype=torch.bfloat16))
    engine.backward(_WithGradient.apply(model.weight, 1 + 2.0**-12).sum())
    engine.step()
    norm = engine.get_global_grad_norm()
    engine.destroy()
    return norm


class _WithGradient(torch.autograd.Function):
    """The parameter in fp32, with a given fp32 gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: float) -> Tensor:
        ctx.value = value
        return weight.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.full_like(grad, ctx.value), None


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no Tensor.grad_dtype")
@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, 1 + 2.0**-12), (torch.bfloat16, 1.0)])
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_of_another_dtype_than_their_parameter(ranks, stage, dtype, expected):
    """G15. `grad_dtype` float32 on a bf16 parameter keeps the gradient's precision."""
    assert ranks(2).run(_gradient_in_other_dtype, stage, dtype) == [expected] * 2
