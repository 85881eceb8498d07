"""`linear_cross_entropy` equals the loss of whole logits to rounding, never has them, and refuses what it cannot do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from partita.nn.functional import linear_cross_entropy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

TOKENS, WORDS, WIDTH = 39, 101, 24
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Rounding of the loss is that of the logits; gradients are rounded once more where products have 16 bits.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Any = None, **options: Any) -> Tensor:
    """What a program without `linear_cross_entropy` writes."""
    softcap = options.pop("logit_softcap", None)
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, targets.reshape(-1), **options)
    return losses.view(targets.shape) if options.get("reduction") == "none" else losses


def some(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (3, 13), ignored: float = 0.2) -> dict[str, Any]:
    """hidden, weight, bias, targets."""
    random = torch.Generator().manual_seed(0)
    targets = torch.randint(0, WORDS, shape, generator=random)
    return {
        "hidden": torch.randn(*shape, WIDTH, generator=random).to(dtype),
        "weight": (torch.randn(WORDS, WIDTH, generator=random) * 0.3).to(dtype),
        "bias": torch.randn(WORDS, generator=random).to(dtype),
        "targets": targets.where(torch.rand(shape, generator=random) >= ignored, -100),
    }


def outcome(
    loss_of: Any, given: dict[str, Any], upstream: Any = 1.0, dtype: Any = None, **options: Any
) -> list[Tensor]:
    """The loss and the gradients of hidden, weight and bias, in fp64."""
    leaves = {k: v.detach().to(dtype or v.dtype).requires_grad_() for k, v in given.items() if k != "targets"}
    loss = loss_of(**leaves, targets=given["targets"], **options)
    (loss * upstream).sum().backward()
    return [loss.detach().double(), *(leaf.grad.double() for leaf in leaves.values())]


def assert_near(own: list[Tensor], true: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(("loss", "hidden", "weight", "bias"), own, true, strict=False):
        assert a.shape == b.shape
        error = (a - b).abs().max() / b.abs().max()
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"logit_softcap": 2.0}], ids=str)
@pytest.mark.parametrize("chunk_tokens", [2, 7, None])
def test_it_equals_the_loss_of_whole_logits(dtype, reduction, options, chunk_tokens):
    given = some(dtype)
    upstream = torch.rand(3, 13) if reduction == "none" else 0.5
    own = outcome(linear_cross_entropy, given, upstream, reduction=reduction, chunk_tokens=chunk_tokens, **options)
    true = outcome(plain, given, upstream, torch.float64, reduction=reduction, **options)
    assert_near(own, true, TOLERANCE[dtype])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_loss_scale_of_fp16_loses_nothing(reduction):
    """Rare words have gradients that fp16 lacks without the loss scale: ours are as exact as torch's."""
    given = some(torch.float16)
    given["weight"], given["bias"] = given["weight"] / 8, given["bias"] / 8
    given["bias"][::3] -= 9  # probabilities around 1e-6, of words that are no targets
    given["targets"] += given["targets"] % 3 == 0
    scale = 2.0**12 if reduction == "mean" else 2.0**7
    own = outcome(linear_cross_entropy, given, scale, reduction=reduction, chunk_tokens=7)
    theirs = outcome(plain, given, scale, reduction=reduction)
    true = outcome(plain, given, scale, torch.float64, reduction=reduction)
    for a, b, c in zip(own[2:], theirs[2:], true[2:], strict=True):
        assert (a - c)[::3].norm() <= 1.05 * (b - c)[::3].norm()


def test_sums_of_fp16_do_not_overflow_before_they_are_divided():
    given = some(torch.float16, (2000,), 0)
    given["hidden"] = given["hidden"].abs() * 40  # 2000 x 40 is beyond fp16, its mean is not
    given["targets"].fill_(3)
    own = outcome(linear_cross_entropy, given, chunk_tokens=2000)
    assert_near(own, outcome(plain, given, 1.0, torch.float64), 4e-3)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_multiplies_in_16_bits_and_returns_gradients_of_the_dtype_given(autocast, reduction):
    given = some()
    upstream = torch.rand(3, 13) if reduction == "none" else 1.0

    def cast(**arguments: Any) -> Tensor:
        with torch.autocast("cpu", autocast):
            return linear_cross_entropy(**arguments)

    own = outcome(cast, given, upstream, reduction=reduction, chunk_tokens=7)
    assert_near(own, outcome(plain, given, upstream, torch.float64, reduction=reduction), TOLERANCE[autocast])
    exact = outcome(linear_cross_entropy, given, upstream, reduction=reduction)
    assert (own[2] - exact[2]).abs().max() > 0, "the product had 16 bits"


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that was made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and all(value.alias_info is None for value in func._schema.returns):  # no view
            self.numel = max(self.numel, made.numel())
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_never_exist_whole(dtype, reduction):
    given = some(dtype, (400,), 0)
    with Largest() as largest:
        outcome(linear_cross_entropy, given, reduction=reduction, chunk_tokens=50)
    assert largest.numel == max(50 * WORDS, 400 * WIDTH)


def test_without_gradients_nothing_but_the_loss_is_made():
    given = some(shape=(8,), ignored=0)
    given["weight"].requires_grad_()
    with torch.no_grad(), Largest() as largest:
        loss = linear_cross_entropy(**given, chunk_tokens=2)
    assert largest.numel == 2 * WORDS, "no gradient of the weight"
    torch.testing.assert_close(loss, plain(**given).detach())


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_each_may_be_frozen(trained, reduction):
    given = some()
    given[trained].requires_grad_()
    (own,) = torch.autograd.grad(linear_cross_entropy(**given, reduction=reduction).sum(), given[trained])
    (true,) = torch.autograd.grad(plain(**given, reduction=reduction).sum(), given[trained])
    torch.testing.assert_close(own, true)


@pytest.mark.parametrize("shape", [(), (5,), (2, 0, 3), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", [0.0, 1.0])
def test_any_shape_and_no_tokens_at_all(shape, reduction, ignored):
    """The mean over no tokens is NaN, and its gradients are zeros, as torch's."""
    given = some(shape=shape, ignored=ignored)
    flat = {**given, "hidden": given["hidden"].reshape(-1, WIDTH), "targets": given["targets"].reshape(-1)}
    own = outcome(linear_cross_entropy, given, reduction=reduction)
    true = outcome(plain, flat, reduction=reduction)
    for a, b in zip(own, true, strict=True):
        torch.testing.assert_close(a.reshape(b.shape), b, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ignore_index", [-1, 0, 100])
def test_any_index_may_be_ignored(ignore_index):
    given = some(ignored=0)
    given["targets"][:, ::2] = ignore_index
    own = outcome(linear_cross_entropy, given, ignore_index=ignore_index)
    assert_near(own, outcome(plain, given, ignore_index=ignore_index), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_graph_that_is_kept_gives_the_same_gradients_again(dtype, reduction):
    given = some(dtype)
    given["weight"].requires_grad_()
    loss = linear_cross_entropy(**given, reduction=reduction).sum()
    first, again = (torch.autograd.grad(loss, given["weight"], retain_graph=True)[0] for _ in range(2))
    (last,) = torch.autograd.grad(loss, given["weight"])
    assert torch.equal(first, again)
    torch.testing.assert_close(last, first, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_checkpoint_computes_it_again(use_reentrant, reduction):
    given = some()

    def checkpointed(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor, **options: Any) -> Tensor:
        def head(*args: Tensor) -> Tensor:
            return linear_cross_entropy(*args, **options)

        return checkpoint(head, hidden, weight, targets, bias, use_reentrant=use_reentrant)

    own = outcome(checkpointed, given, reduction=reduction)
    assert_near(own, outcome(linear_cross_entropy, given, reduction=reduction), 0)


def test_a_compiled_program_may_call_it():
    given = some(shape=(9,))

    @torch.compile(backend="eager")
    def compiled(hidden: Tensor, **rest: Any) -> Tensor:
        return linear_cross_entropy(hidden * 2, **rest) * 3

    def eager(hidden: Tensor, **rest: Any) -> Tensor:
        return plain(hidden * 2, **rest) * 3

    assert_near(outcome(compiled, given), outcome(eager, given), 1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused(reduction):
    given = some()
    given["hidden"].requires_grad_()
    loss = linear_cross_entropy(**given, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match=r"linear_cross_entropy\(\) has no second derivative.*F.cross_entropy"):
        torch.autograd.grad(loss, given["hidden"], create_graph=True)


WRONG = {
    "there is a target 101: targets are 0 to 100, or -100": {"targets": torch.full((3, 13), WORDS)},
    "there is a target -1": {"targets": torch.full((3, 13), -1)},
    "targets of shape .39.": {"targets": torch.zeros(39, dtype=torch.int64)},
    "targets are torch.float32": {"targets": torch.zeros(3, 13)},
    "weight of shape .24, 101.": {"weight": torch.zeros(WIDTH, WORDS)},
    "bias of shape .24.": {"bias": torch.zeros(WIDTH)},
    "hidden is torch.bfloat16 and weight is torch.float32": {"hidden": torch.zeros(3, 13, WIDTH).bfloat16()},
    "must be floating-point": {"hidden": torch.zeros(3, 13, WIDTH, dtype=torch.int64)},
    "reduction = 'avg': it is 'mean', 'sum' or 'none'": {"reduction": "avg"},
    "label_smoothing = 1.5": {"label_smoothing": 1.5},
    "logit_softcap = 0": {"logit_softcap": 0.0},
    "chunk_tokens = 0": {"chunk_tokens": 0},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_named(message):
    with pytest.raises(ValueError, match=r"linear_cross_entropy\(\): .*" + message):
        linear_cross_entropy(**{**some(), **WRONG[message]})
