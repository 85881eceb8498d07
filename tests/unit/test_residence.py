"""units/residence/: the table of states, call by call, and what becomes of memory and values on the way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from partita.comm import CommunicationError, Handle, SingleProcess
from partita.device import HostStreams
from partita.units import Always, FlatParameters, Gathered, Mapped, ParameterInfo, Residence, Residency, make_layout
from partita.units.absent import AbsentParameterError
from torch import Tensor, nn

ABSENT, COMING, HERE, PINNED = Residency

VALUES = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4.0) + 10}


class Alone(SingleProcess):
    """A group of one that maps memory, counts barriers, and whose gathers fail when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.barriers = 0
        self.gathers = 0
        self.fails = False

    def mapped(self, numel: int, dtype: torch.dtype) -> Tensor | None:
        return torch.zeros(numel, dtype=dtype)

    def barrier(self) -> None:
        self.barriers += 1

    def all_gather(self, buffer: Tensor) -> Handle:
        self.gathers += 1
        return self

    def wait(self) -> None:
        if self.fails:
            raise CommunicationError("rank 1 has died")


def residence_of(kind: type[Residence], communicator: SingleProcess | None = None) -> Residence:
    """Two parameters with `VALUES`, taken."""
    infos = [ParameterInfo(name, tuple(value.shape), 0, 4, "torch.float32") for name, value in VALUES.items()]
    layout = make_layout(infos, 1)
    parameters = [nn.Parameter(torch.empty_like(value)) for value in VALUES.values()]
    more = {"streams": HostStreams()} if kind is Gathered else {}
    residence = kind(layout, parameters, torch.float32, range(layout.numel), communicator or Alone(), **more)
    for slot, value in zip(layout.slots, VALUES.values(), strict=True):
        residence.own_params[slot.in_unit] = value.view(-1)
    residence.take()
    return residence


def own_values(residence: Residence) -> list[list[float]]:
    return [residence.own_params[slot.in_unit].tolist() for slot in residence.layout.slots]


def has_values(residence: Residence) -> bool:
    return all(torch.equal(p, v) for p, v in zip(residence.parameters, VALUES.values(), strict=True))


WAYS: dict[Residency, list[str]] = {
    ABSENT: [],
    COMING: ["start_gather"],
    HERE: ["start_gather", "wait"],
    PINNED: ["pin"],
}
# The table of `Residence`, with what HERE and PINNED become by the ways above.
TABLE: dict[Residency, dict[str, Residency | None]] = {
    ABSENT: {"start_gather": COMING, "wait": None, "release": ABSENT, "pin": PINNED, "unpin": None, "commit": None},
    COMING: {"start_gather": COMING, "wait": HERE, "release": ABSENT, "pin": PINNED, "unpin": None, "commit": None},
    HERE: {"start_gather": HERE, "wait": HERE, "release": ABSENT, "pin": PINNED, "unpin": None, "commit": None},
    PINNED: {
        "start_gather": PINNED,
        "wait": PINNED,
        "release": PINNED,
        "pin": PINNED,
        "unpin": ABSENT,
        "commit": PINNED,
    },
}
CELLS = [(state, call) for state, row in TABLE.items() for call in row]


def do(residence: Residence, call: str) -> None:
    calls: dict[str, Callable[[], None]] = {
        "start_gather": residence.start_gather,
        "wait": residence.wait,
        "release": residence.release,
        "pin": residence.pin,
        "unpin": residence.unpin,
        "commit": lambda: residence.commit(residence.parameters),
    }
    calls[call]()


@pytest.mark.parametrize("kind", [Mapped, Gathered])
@pytest.mark.parametrize(("state", "call"), CELLS, ids=lambda cell: getattr(cell, "name", cell))
def test_the_table_of_parameters_that_come_and_go(kind, state, call):
    """Every cell: the next state, or an error that names the call and the state and changes nothing."""
    residence = residence_of(kind)
    for earlier in WAYS[state]:
        do(residence, earlier)
    assert residence.state is state
    expected = TABLE[state][call]
    if expected is None:
        with pytest.raises(RuntimeError, match=rf"{call}\(\).*'a'.*{state.name}.*legal in"):
            do(residence, call)
        expected = state
    else:
        do(residence, call)
    assert residence.state is expected
    assert (residence.gathered_bytes > 0) == (expected is PINNED or (kind is Gathered and expected is not ABSENT))
    if expected in (HERE, PINNED):
        assert has_values(residence)
    elif expected is ABSENT:
        with pytest.raises(AbsentParameterError):
            residence.parameters[0] + 1


@pytest.mark.parametrize("call", ["unpin", "commit"])
def test_parameters_that_are_always_here_are_pinned_first_too(call):
    residence = residence_of(Always)
    for legal in ("start_gather", "wait", "release"):
        do(residence, legal)
        assert residence.state is HERE
    with pytest.raises(RuntimeError, match=rf"{call}\(\).*HERE"):
        do(residence, call)
    for earlier in ("pin", "pin", "commit", "unpin"):
        do(residence, earlier)
        assert residence.state is PINNED
    do(residence, "unpin")
    assert residence.state is HERE
    assert residence.gathered_bytes == 0
    assert has_values(residence)


@pytest.mark.parametrize("kind", [Mapped, Gathered])
def test_pins_are_counted_and_a_module_that_computes_keeps_the_parameters(kind):
    """A forward under way when the last pin goes: backward needs what the forward saved."""
    residence = residence_of(kind)
    for call, state in [
        ("pin", PINNED),
        ("pin", PINNED),
        ("start_gather", PINNED),
        ("unpin", PINNED),
        ("unpin", HERE),
        ("pin", PINNED),
        ("release", PINNED),
        ("unpin", ABSENT),
    ]:
        do(residence, call)
        assert residence.state is state, call


@pytest.mark.parametrize("kind", [Mapped, Gathered])
def test_what_was_saved_for_backward_is_valid_again_with_the_parameters(kind):
    residence = residence_of(kind)
    weight, bias = residence.parameters
    x = torch.ones(1, 2, requires_grad=True)
    do(residence, "start_gather")
    do(residence, "wait")
    y = (x @ weight).sum() + bias.sum()
    do(residence, "release")
    do(residence, "start_gather")
    do(residence, "wait")
    y.backward()
    assert x.grad is not None
    assert x.grad.tolist() == [VALUES["a"].sum(1).tolist()]


@pytest.mark.parametrize("kind", [Mapped, Gathered])
def test_pinned_parameters_are_a_copy_until_they_are_committed(kind):
    """Peers read `own_params` of a mapped unit: what is written reaches it by commit alone, and only what was named."""
    communicator = Alone()
    residence = residence_of(kind, communicator)
    a, b = residence.parameters
    do(residence, "pin")
    with torch.no_grad():
        a.fill_(-1)
        b.fill_(-2)
    assert own_values(residence) == [v.view(-1).tolist() for v in VALUES.values()]
    residence.commit([b])
    assert communicator.barriers == (kind is Mapped)  # before others may read it
    do(residence, "unpin")
    do(residence, "start_gather")
    do(residence, "wait")
    assert torch.equal(a, VALUES["a"])
    assert b.tolist() == [-2] * 4


@pytest.mark.parametrize("kind", [Mapped, Gathered])
def test_an_array_of_numpy_outlives_the_gathered_values(kind):
    """numpy() ties a storage to its size; the unit goes on with another one."""
    residence = residence_of(kind)
    do(residence, "pin")
    array = residence.parameters[0].detach().numpy()
    do(residence, "unpin")
    assert residence.gathered_bytes == 0
    assert array.tolist() == VALUES["a"].tolist()
    assert list(residence.moved()) == []
    do(residence, "pin")
    array.fill(7)
    assert has_values(residence)


@pytest.mark.parametrize("kind", [Mapped, Gathered])
def test_an_assigned_data_is_forgotten_with_the_pin(kind):
    residence = residence_of(kind)
    do(residence, "pin")
    residence.parameters[1].data = torch.zeros(4)
    assert [slot.name for slot in residence.moved()] == ["b"]
    do(residence, "unpin")
    assert list(residence.moved()) == []
    do(residence, "pin")
    assert has_values(residence)


def test_a_failed_gather_is_raised_by_wait_and_keeps_the_memory():
    """The transport may still write there. release() raises nothing: whoever waited has the error."""
    communicator = Alone()
    residence = residence_of(Gathered, communicator)
    communicator.fails = True
    do(residence, "start_gather")
    for _ in range(2):
        with pytest.raises(CommunicationError):
            do(residence, "wait")
        do(residence, "release")
        assert residence.state is COMING
        assert residence.gathered_bytes > 0
    with pytest.raises(CommunicationError):
        do(residence, "pin")
    assert residence.state is COMING
    communicator.fails = False
    do(residence, "release")
    assert residence.state is ABSENT


def test_a_gather_is_started_once_and_mapped_parameters_need_none():
    for kind, expected in ((Gathered, 1), (Mapped, 0), (Always, 0)):
        communicator = Alone()
        residence = residence_of(kind, communicator)
        for call in ("start_gather", "start_gather", "wait", "pin", "unpin"):
            do(residence, call)
        assert communicator.gathers == expected, kind


def test_ranks_without_shared_memory_have_nothing_to_map():
    with pytest.raises(ValueError, match="share no memory"):
        residence_of(Mapped, SingleProcess())


def test_what_others_ask_of_a_residence():
    """Who reads and who must be told, in place of the name of a lifetime."""
    asked = {kind: (kind.comes_and_goes, kind.is_read_by_peers, kind.all_gathers_updates) for kind in (Always, Mapped)}
    assert asked == {Always: (False, False, True), Mapped: (True, True, False)}
    assert (Gathered.comes_and_goes, Gathered.is_read_by_peers, Gathered.all_gathers_updates) == (True, False, False)


# -- FlatParameters over a residence


def flat_of(kind: type[Residence]) -> FlatParameters:
    flat = FlatParameters(residence_of(kind))
    flat.take_parameters()
    return flat


def write(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter.add_(1)


@pytest.mark.parametrize("kind", [Mapped, Gathered])
def test_writes_inside_a_pin_are_forgotten_and_those_before_it_are_not(kind):
    flat = flat_of(kind)
    flat.pin()
    write(flat.parameters[0])
    flat.unpin()
    flat.check_unwritten()
    assert flat.take_written() == set()
    flat.residence.start_gather()
    flat.residence.wait()
    write(flat.parameters[1])
    flat.pin()
    write(flat.parameters[0])
    flat.unpin()
    with pytest.raises(RuntimeError, match="parameter 'b' was written to"):
        flat.check_unwritten()


@pytest.mark.parametrize("kind", [Mapped, Gathered])
def test_a_pin_inside_a_pin_does_not_make_earlier_writes_unclaimed(kind):
    flat = flat_of(kind)
    flat.pin()
    write(flat.parameters[0])
    flat.pin()
    flat.unpin()
    flat.unpin()
    flat.check_unwritten()
    assert flat.take_written() == set()


@pytest.mark.parametrize("kind", [Always, Mapped, Gathered])
def test_what_was_committed_is_told_once(kind):
    flat = flat_of(kind)
    flat.pin()
    write(flat.parameters[1])
    flat.commit([flat.parameters[1]])
    flat.unpin()
    flat.check_unwritten()
    assert [slot.name for slot in flat.take_written()] == ["b"]
    assert flat.take_written() == set()


def test_what_is_written_to_parameters_that_are_always_here_is_told():
    """Also what was written inside a pin, as it is there to stay."""
    flat = flat_of(Always)
    flat.pin()
    write(flat.parameters[0])
    flat.unpin()
    assert [slot.name for slot in flat.take_written()] == ["a"]
    assert flat.take_written() == set()


@pytest.mark.parametrize("kind", [Always, Mapped, Gathered])
def test_whole_values_are_read_without_pins_where_they_lie(kind):
    flat = flat_of(kind)
    with flat.whole() as values_of:
        assert flat.residence.is_pinned == (kind is Gathered)
        for parameter, value in zip(flat.parameters, VALUES.values(), strict=True):
            assert torch.equal(values_of(parameter), value)
    assert not flat.residence.is_pinned
    assert flat.residence.gathered_bytes == 0
