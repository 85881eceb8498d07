"""zero_optimization.overlap_gather: forward waits for updated parameters where it needs them; all else is the same."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import inside
import partita
import pytest
import torch
import torch.nn.functional as F
from communicators import SlowCommunicator, WaitingCommunicator, Wrapped, communicating_through
from gradient_models import LAYERS, WIDTH, Chain
from partita.comm import CommunicationError, Communicator, Handle
from torch import Tensor, nn

SHARDED = (1, 2)
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "split": {"bf16": {"enabled": True, "master_weights": "split"}},
}


class Winding(nn.Module):
    """A module called several times, one never called, a parameter of the root."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(7, 7)
        self.last = nn.Sequential(nn.Linear(7, 11), nn.LayerNorm(11), nn.Linear(11, 1))
        self.scale = nn.Parameter(torch.ones(1))
        self.unused = nn.Linear(9, 7)  # in the unit that is gathered last: no forward waits for it

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.scale.dtype)
        for _ in range(3):
            x = torch.tanh(self.shared(x))
        x = self.shared(self.scale * x)
        return F.mse_loss(self.last(x).float(), torch.ones(len(x), 1))


def config(stage: int, *, overlap: bool, accumulation: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.05, "weight_decay": 0.1}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 40, "overlap_gather": overlap},
        "steps_per_print": 0,
        **changes,
    }


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _train(settings: dict[str, Any], wrap: Callable[[Communicator], Any] | None) -> dict[str, Any]:
    through: AbstractContextManager[Any] = nullcontext() if wrap is None else communicating_through(wrap)
    with through:
        engine = partita.Engine(model=Winding(), config=settings)
        seen: dict[str, Any] = {}
        for step in range(6):
            for i in range(engine.gradient_accumulation_steps()):
                loss = engine(numbers(100 * step + 10 * i + engine.global_rank, 2, 7))
                seen[f"loss {step} {i}"] = loss.detach()
                engine.backward(loss)
                engine.step()
            if step % 2:  # other steps go on to the next forward at once
                seen |= {f"{step} {name}": value for name, value in engine.module_state_dict().items()}
            if step == 2:
                seen["eval"] = engine.eval_batch(numbers(7, 2, 7))
            if step == 4:
                engine.eval()
                with torch.no_grad():
                    seen["eval mode"] = engine(numbers(8, 2, 7))
                engine.train()
        seen["norm"] = torch.tensor(engine.get_global_grad_norm())
        engine.destroy()
    return seen


@pytest.mark.parametrize(
    ("world_size", "accumulation", "precision", "wrap"),
    [
        (2, 1, "fp32", None),
        (2, 3, "bf16", None),
        (3, 2, "split", None),
        (2, 3, "fp32", SlowCommunicator),
        (3, 1, "split", SlowCommunicator),
        (2, 1, "split", WaitingCommunicator),
    ],
)
@pytest.mark.parametrize("stage", [*SHARDED, 3])
def test_overlap_changes_no_bit(ranks, stage, world_size, accumulation, precision, wrap):
    """Losses, weights right after a step, evaluation between steps; whether gathers are fast, slow, or not begun."""
    runs = [
        ranks(world_size).run(
            _train, config(stage, overlap=overlap, accumulation=accumulation, **PRECISIONS[precision]), wrap
        )
        for overlap in (True, False)
    ]
    for rank, (ours, theirs) in enumerate(zip(*runs, strict=True)):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), f"{name} on rank {rank}"


class GatesCommunicator(Wrapped):
    """No all-gather begins before it is waited for; counts launches, and notes who waits for which."""

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner)
        self.launched = 0
        self.waits: list[int] = []  # which gathers were waited for, in order
        self.pending: list[int] = []  # at each launch, earlier gathers that were not waited for

    def start(self, name: str, buffer: Tensor, collective: Callable[[], Handle]) -> Handle:
        if name != "all_gather":
            return collective()
        self.pending.append(self.launched - len(self.waits))
        self.launched += 1
        return _Gated(self, self.launched - 1, collective)


class _Gated:
    def __init__(self, owner: GatesCommunicator, index: int, collective: Callable[[], Handle]) -> None:
        self._owner, self._index, self._collective = owner, index, collective

    def wait(self) -> None:
        self._owner.waits.append(self._index)
        self._collective().wait()


class Watched(Chain):
    """Notes how many gathers had been waited for when each layer ran."""

    def __init__(self) -> None:
        super().__init__()
        self.waited_for: Callable[[], int] = lambda: 0
        self.trace: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            self.trace.append(self.waited_for())
        return x.square().mean()


def _where_it_waits(stage: int, overlap: bool) -> tuple[int, int, list[int], list[int]]:
    """Gathers waited for when step() returned, of how many, when each layer ran, and after module_state_dict()."""
    with communicating_through(GatesCommunicator) as gates:
        model = Watched()
        settings = config(stage, overlap=overlap)
        settings["zero_optimization"]["reduce_bucket_size"] = WIDTH**2  # a unit for each layer
        engine = partita.Engine(model=model, config=settings)
        model.waited_for = lambda: len(gates.waits)
        engine.backward(engine(numbers(engine.global_rank, 2, WIDTH)))
        engine.step()
        after_step, launched = len(gates.waits), gates.launched
        model.trace.clear()
        engine.backward(engine(numbers(5 + engine.global_rank, 2, WIDTH)))
        engine.step()
        before_state_dict = len(gates.waits)
        engine.module_state_dict()
        trace = list(model.trace)
        engine.destroy()
    return after_step, launched, trace, [before_state_dict, len(gates.waits)]


@pytest.mark.parametrize("stage", SHARDED)
def test_each_layer_waits_for_its_own_parameters(ranks, stage):
    """step() returns with all gathers under way; then each layer waits for one; module_state_dict() for all."""
    for after_step, launched, trace, state_dict in ranks(2).run(_where_it_waits, stage, True):
        assert (after_step, launched) == (0, LAYERS)
        assert trace == list(range(1, LAYERS + 1))
        assert state_dict == [LAYERS, 2 * LAYERS]


@pytest.mark.parametrize("stage", SHARDED)
def test_without_overlap_the_step_waits(ranks, stage):
    for after_step, launched, trace, state_dict in ranks(2).run(_where_it_waits, stage, False):
        assert (after_step, launched) == (LAYERS, LAYERS)
        assert trace == [LAYERS] * LAYERS
        assert state_dict == [2 * LAYERS, 2 * LAYERS]


def _pending_at_launches(stage: int) -> tuple[list[int], int]:
    with communicating_through(GatesCommunicator) as gates:
        engine = partita.Engine(model=Winding(), config=config(stage, overlap=True))
        for step in range(3):
            engine.backward(engine(numbers(step + engine.global_rank, 2, 7)))
            engine.step()
        engine.module_state_dict()
        units = len(inside.units(engine))
        engine.destroy()
    return gates.pending, units


@pytest.mark.parametrize("stage", SHARDED)
def test_what_no_forward_needed_is_waited_for_before_the_next_update(ranks, stage):
    """Parameters never used are still on their way then, and the update writes them."""
    for pending, units in ranks(2).run(_pending_at_launches, stage):
        assert pending == list(range(units)) * 3


class HeldCommunicator(Wrapped):
    """All-gathers run on a thread of their own, and not before `release` is set."""

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner)
        self.release = threading.Event()
        self.done = 0

    def start(self, name: str, buffer: Tensor, collective: Callable[[], Handle]) -> Handle:
        return collective() if name != "all_gather" else _Held(self, collective)


class _Held:
    """One thread for each, begun after the one before it has ended: all ranks keep the order."""

    last: threading.Thread | None = None

    def __init__(self, owner: HeldCommunicator, collective: Callable[[], Handle]) -> None:
        self._owner, self._collective, self._before = owner, collective, _Held.last
        self._thread = _Held.last = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._owner.release.wait(20)
        if self._before is not None:
            self._before.join()
        self._collective().wait()
        self._owner.done += 1

    def wait(self) -> None:
        self._thread.join()


def _step_returns_early(stage: int) -> tuple[int, int]:
    """Gathers done when step() returned, and when the next forward did."""
    with communicating_through(HeldCommunicator) as held:
        settings = config(stage, overlap=True)
        settings["zero_optimization"]["reduce_bucket_size"] = WIDTH**2
        engine = partita.Engine(model=Chain(), config=settings)
        engine.backward(engine(numbers(engine.global_rank, 2, WIDTH)))
        engine.step()
        after_step = held.done
        threading.Timer(0.05, held.release.set).start()  # while forward waits
        engine(numbers(1, 2, WIDTH))
        after_forward = held.done
        engine.zero_grad()
        engine.destroy()
    return after_step, after_forward


@pytest.mark.parametrize("stage", SHARDED)
def test_step_returns_before_the_gathers_are_done(ranks, stage):
    assert ranks(2).run(_step_returns_early, stage) == [(0, LAYERS)] * 2


def _hooks_left(stage: int, overlap: bool) -> tuple[int, int, bool, bool]:
    """Forward hooks while training and after destroy(); whether the weights then are those of the last step."""
    with communicating_through(WaitingCommunicator):
        model = Winding()
        engine = partita.Engine(model=model, config=config(stage, overlap=overlap))
        for step in range(2):
            engine.backward(engine(numbers(step + engine.global_rank, 2, 7)))
            engine.step()
        during = sum(len(m._forward_pre_hooks) for m in model.modules())
        weights = engine.module_state_dict()
        engine.backward(engine(numbers(9 + engine.global_rank, 2, 7)))
        engine.step()
        engine.destroy()
        left = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
        watched = any(p._post_accumulate_grad_hooks for p in model.parameters())
        moved = any(not torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        other = partita.Engine(model=model, config=config(stage, overlap=overlap))
        other.backward(other(numbers(3, 2, 7)))
        other.step()
        other.destroy()
    return during, left, watched, moved


@pytest.mark.parametrize("stage", SHARDED)
def test_nothing_stays_on_the_model(ranks, stage):
    """Every module with parameters of its own waits; destroy() takes that away, and the model can train again."""
    for during, left, watched, moved in ranks(2).run(_hooks_left, stage, True):
        assert during == len(["Winding", "shared", "unused", "last.0", "last.1", "last.2"])
        assert (left, watched, moved) == (0, False, True)
    for during, left, _, _ in ranks(2).run(_hooks_left, stage, False):
        assert (during, left) == (0, 0)


def _weights_after_destroy(stage: int, overlap: bool) -> dict[str, Tensor]:
    with communicating_through(SlowCommunicator):
        model = Winding()
        engine = partita.Engine(model=model, config=config(stage, overlap=overlap))
        engine.backward(engine(numbers(engine.global_rank, 2, 7)))
        engine.step()
        engine.destroy()
        return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("stage", SHARDED)
def test_a_destroyed_engine_leaves_the_weights_of_its_last_step(ranks, stage):
    """destroy() right after step(): the model is the user's again, and has all of its weights."""
    runs = [ranks(2).run(_weights_after_destroy, stage, overlap) for overlap in (True, False)]
    for ours, theirs in zip(*runs, strict=True):
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name


class FailingCommunicator(Wrapped):
    """The second all-gather cannot be launched, or no all-gather ends well."""

    at: str  # "launch" or "wait"

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner)
        self.launched = 0

    def start(self, name: str, buffer: Tensor, collective: Callable[[], Handle]) -> Handle:
        if name != "all_gather":
            return collective()
        self.launched += 1
        if self.at == "launch" and self.launched == 2:
            raise CommunicationError("a rank died")
        return _Failing()


class _Failing:
    def wait(self) -> None:
        raise CommunicationError("a rank died")


class FailingToLaunch(FailingCommunicator):
    at = "launch"


class FailingToEnd(FailingCommunicator):
    at = "wait"


def _raises(call: Callable[[], Any]) -> bool:
    try:
        call()
    except CommunicationError:
        return True
    return False


def _where_it_raises(stage: int, overlap: bool, wrap: type[FailingCommunicator], goes_on: bool) -> list[str]:
    """The calls that raised, of a step whose gathers fail, a forward (where it goes on), and destroy() twice."""
    with communicating_through(wrap):
        model = Winding()
        engine = partita.Engine(model=model, config=config(stage, overlap=overlap))
        engine.backward(engine(numbers(engine.global_rank, 2, 7)))
        calls: list[tuple[str, Callable[[], Any]]] = [("step", engine.step)]
        if goes_on:
            calls.append(("forward", lambda: engine(numbers(1, 2, 7))))
        calls += [("destroy", engine.destroy)] * 2
        raised = [name for name, call in calls if _raises(call)]
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    return raised


@pytest.mark.parametrize(
    ("overlap", "wrap", "goes_on", "where"),
    [
        (False, FailingToEnd, False, "step"),
        (False, FailingToLaunch, False, "step"),
        (True, FailingToLaunch, False, "step"),
        (True, FailingToEnd, True, "forward"),
        (True, FailingToEnd, False, "destroy"),  # or the program would go on with weights that never came
    ],
)
@pytest.mark.parametrize("stage", SHARDED)
def test_a_failed_gather_is_raised_once(ranks, stage, overlap, wrap, goes_on, where):
    """By the first call that waits for it; after that destroy() lets go of everything in peace."""
    assert ranks(2).run(_where_it_raises, stage, overlap, wrap, goes_on) == [[where]] * 2
