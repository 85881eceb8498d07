"""Pipeline schedules as files: our own and torch's are read back as they were; others are refused by line."""

from __future__ import annotations

import csv
import io
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from partita.pipeline import NAMES, ScheduleError, by_name, from_csv, from_text, prove, to_csv, to_text
from torch import nn
from torch.distributed.pipelining import schedules as torch_schedules


@pytest.mark.parametrize("name", NAMES)
def test_files_are_read_as_they_were(name):
    schedule = by_name(name, 3, 6)
    assert from_text(to_text(schedule)) == schedule
    assert from_text(to_csv(schedule)) == schedule
    commented = to_text(schedule).replace("\n", "\n\n# by hand\n")
    assert from_text(commented) == schedule


class Stage:
    """What torch's schedules ask of a stage before they run."""

    def __init__(self, stage: int, rank: int, ranks: int, stages: int) -> None:
        self.stage_index, self.group_rank, self.group_size, self.num_stages = stage, rank, ranks, stages
        self.is_first, self.is_last, self.has_backward = stage == 0, stage == stages - 1, True
        self.stage_index_to_group_rank: dict[int, int] = {}
        self.device, self.submod = "cpu", nn.Identity()


TORCHS = ["Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]


def of_torch(name: str, ranks: int, micro_batches: int) -> str:
    """torch's file of one of its schedules, as its _dump_csv() writes it."""
    v_shaped = name in ("ZBVZeroBubble", "DualPipeV")
    stages = [Stage(s, 0, ranks, 2 * ranks) for s in ((0, 2 * ranks - 1) if v_shaped else (0, ranks))]
    made = getattr(torch_schedules, f"Schedule{name}")(stages, micro_batches)
    file = io.StringIO()
    csv.writer(file).writerows(made.pipeline_order[rank] for rank in range(ranks))
    return file.getvalue()


@pytest.mark.parametrize("name", TORCHS)
def test_files_of_torch_are_read_and_proved(name):
    text = of_torch(name, 4, 8)
    schedule = from_csv(text)
    assert schedule.num_ranks == 4 and schedule.micro_batches == 8
    prove(schedule)


@pytest.mark.parametrize("theirs, ours", [("Interleaved1F1B", "interleaved"), ("DualPipeV", "dualpipe-v")])
@pytest.mark.parametrize("ranks, micro_batches", [(2, 4), (4, 8), (3, 6)])
def test_what_torch_has_too_is_the_same(theirs, ours, ranks, micro_batches):
    assert from_csv(of_torch(theirs, ranks, micro_batches)) == by_name(ours, ranks, micro_batches, 2)


@pytest.mark.parametrize("name", NAMES)
def test_torch_reads_our_files(name):
    schedule = by_name(name, 3, 6)
    for actions, row in zip(schedule.actions, csv.reader(io.StringIO(to_csv(schedule))), strict=True):
        read = [torch_schedules._Action.from_str(cell) for cell in row]
        assert [(a.stage_index, str(a.computation_type), a.microbatch_index) for a in read] == [
            (action.stage, str(torch_schedules._ComputationType.from_str(action.kind)), action.micro_batch)
            for action in actions
        ]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.replace("0F0", "0X0"), "rank 0: '0X0' is no action"),
        (lambda t: t.replace("0F0", "0RECV_F0"), "'0RECV_F0' is no action"),
        (lambda t: t.replace("rank 1", "rank 2"), "there is no line 'rank 1: ...'"),
        (lambda t: t.replace("rank 1", "rank 0"), "line 5: 'rank 0"),
        (lambda t: t.replace("stage ranks: 0 1", "stage ranks: 0 2"), "stage 1 is on rank 2"),
        (lambda t: t.replace("stage ranks: 0 1", "stage ranks: 0 one"), "stage ranks: 'one' is no number"),
        (lambda t: t.replace("micro-batches: 2", "micro-batches: 2 2"), "is not one number"),
        (lambda t: t.replace("micro-batches: 2", "micro-batches: 0"), "micro_batches = 0"),
        (lambda t: t.replace("partita pipeline schedule 1", "partita pipeline schedule 2"), "no action|no schedule"),
        (lambda t: "", "no schedule"),
        (lambda t: "a,b\nc,d\n", "rank 0: 'a' is no action"),
        (lambda t: "0F0\n5F0\n", r"actions of the stages \[0, 5\]"),
    ],
)
def test_other_files_are_refused(change, message):
    with pytest.raises(ScheduleError, match=message):
        from_text(change(to_text(by_name("1f1b", 2, 2))))


@given(st.text(alphabet="0123456789FBIW,:\n rankstgemico-h()", max_size=200))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_no_text_does_harm(text):
    for header in (
        "",
        "partita pipeline schedule 1\n",
        "partita pipeline schedule 1\nstage ranks: 0\nmicro-batches: 1\n",
    ):
        with suppress(ScheduleError):
            prove(from_text(header + text))
