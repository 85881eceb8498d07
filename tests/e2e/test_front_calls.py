"""What a program calls before an engine, with DeepSpeed's arguments: the process group, command lines, loaders."""

from __future__ import annotations

import argparse
import os
import subprocess
from types import SimpleNamespace

import partita
import partita.utils
import pytest
import torch
from torch.utils.data import DataLoader

LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# For each case the beginning of the error, or the backend, the rank and the world size.
JOINS = """
import os, socket, sys
from datetime import timedelta
import torch.distributed as dist
import partita

def joined(environment, **arguments):
    os.environ.update(environment)
    try:
        partita.init_distributed(**arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        for name in environment:
            del os.environ[name]
    answer = f"{dist.get_backend()} {dist.get_rank()} of {dist.get_world_size()}"
    dist.destroy_process_group()
    return answer

with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
mpi = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}
print(joined({}))
print(joined({}, dist_backend="gloo", verbose=False, config={}, timeout=timedelta(seconds=30)))
print(joined({}, backend="gloo", dist_init_required=True))
print(joined(alone, distributed_port=port))
print(joined(alone))
print(joined({}, init_method=f"file://{sys.argv[1]}/a", rank=0, world_size=1))
print(joined({"RANK": "0", "WORLD_SIZE": "1"}, init_method=f"file://{sys.argv[1]}/b"))
print(joined({}, dist_init_required=False))
print(joined(mpi))
print(joined({"PMI_SIZE": "2"}))
print(joined({"PMI_SIZE": "1"}))
print(joined(mpi, auto_mpi_discovery=False))
print(joined({}, auto_mpi_discovery=timedelta(seconds=3)))
print(joined({}, timeout=30))
print(joined({}, dist_backend=3))
"""
ALONE = "gloo 0 of 1"
JOINED = [
    ALONE,
    ALONE,
    ALONE,
    ALONE,
    "RuntimeError: RANK, WORLD_SIZE, MASTER_ADDR set but MASTER_PORT missing",
    ALONE,
    ALONE,
    "RuntimeError: dist_init_required=False, and there is no process group",
    "RuntimeError: OMPI_COMM_WORLD_SIZE = 4: MPI started several processes",
    "RuntimeError: PMI_SIZE = 2",
    ALONE,
    ALONE,
    "TypeError: init_distributed(): auto_mpi_discovery must be a bool; give timeout= by its name",
    "TypeError: init_distributed(): timeout must be a datetime.timedelta, got 30",
    "TypeError: init_distributed(): dist_backend must be",
]


def test_init_distributed_takes_deepspeeds_arguments(tmp_path, python):
    """Each is used, asks for nothing, or is refused by its name; processes of mpirun do not train alone unnoticed."""
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER and "MPI" not in k and "PMI" not in k}
    command = [*python.command, "-c", JOINS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(JOINED)
    for line, expected in zip(lines, JOINED, strict=True):
        assert line.startswith(expected), f"{line!r}, expected {expected!r}"


# -- add_config_arguments


def test_command_line_arguments_are_deepspeeds():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int)
    assert partita.add_config_arguments(parser) is parser
    none = parser.parse_args([])
    assert (none.deepspeed, none.deepspeed_config) == (False, None)
    given = parser.parse_args(["--deepspeed", "--deepspeed_config", "ds.json", "--epochs", "3"])
    assert (given.deepspeed, given.deepspeed_config, given.epochs) == (True, "ds.json", 3)


def test_options_that_a_parser_has_stay_its_own():
    """Hugging Face's parser has `--deepspeed PATH`; a second call changes nothing."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--deepspeed", type=str)
    for _ in range(2):
        partita.add_config_arguments(parser)
    given = parser.parse_args(["--deepspeed", "ds.json"])
    assert (given.deepspeed, given.deepspeed_config) == ("ds.json", None)


# -- RepeatingLoader


def test_a_repeating_loader_begins_again_with_a_new_order():
    torch.manual_seed(0)
    loader = partita.RepeatingLoader(DataLoader(list(range(6)), batch_size=2, shuffle=True))
    assert partita.utils.RepeatingLoader is partita.RepeatingLoader
    assert len(loader) == 3
    assert iter(loader) is loader
    epochs = [[next(loader) for _ in range(3)] for _ in range(4)]
    for epoch in epochs:
        assert sorted(torch.cat(epoch).tolist()) == list(range(6))
    assert len({tuple(torch.cat(epoch).tolist()) for epoch in epochs}) > 1


@pytest.mark.parametrize("loader", [[], iter(()), DataLoader([1], batch_size=2, drop_last=True)])
def test_a_loader_without_batches_is_named_and_does_not_hang(loader):
    """StopIteration would end a training loop without a word."""
    with pytest.raises(ValueError, match=f"epoch of the {type(loader).__name__} has no batches"):
        next(partita.RepeatingLoader(loader))


def test_a_loader_that_can_be_read_only_once_is_named_when_it_ends():
    loader = partita.RepeatingLoader(iter([SimpleNamespace(x=1)]))
    assert next(loader).x == 1
    with pytest.raises(ValueError, match="read only once"):
        next(loader)
