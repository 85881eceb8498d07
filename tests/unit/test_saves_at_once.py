"""Programs that save into one folder at the same time: all that is published is whole, and stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
from checkpoints import fill, save, version_of
from partita.checkpoint.claim import MIN_AGE_S, new_claim, take_over
from partita.checkpoint.commit import Staging, sweep
from partita.checkpoint.disk import remove
from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.folder import checkpoints, find
from partita.checkpoint.manifest import MANIFEST

HARNESS = Path(__file__).parents[1] / "harness"
SAVES = 60
# Of harness/interleaved.py.
SCENARIOS = [
    "two saves",
    "two saves without exchange",
    "save and sweep",
    "sweep and save",
    "save and prune",
    "prune and save",
    "save and find",
    "find and save",
]


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def start(shim: Path, directory: Path, *words: object, **more: str) -> subprocess.Popen[str]:
    """Below the shim, so that no fsync takes time."""
    paths = os.pathsep.join([str(HARNESS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "LD_PRELOAD": str(shim), "FAULT_FOLDER": str(directory), "PYTHONPATH": paths, **more}
    command = [sys.executable, HARNESS / "at_once.py", directory, *map(str, words)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def lacks(directory: Path, tag: str) -> list[str]:
    """What a checkpoint lacks of its manifest; nothing if there is none, or if it is replaced while it is looked at."""
    try:
        fd = os.open(directory / tag, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return []
    try:
        with open(os.open(MANIFEST, os.O_RDONLY, dir_fd=fd)) as file:
            files = json.load(file)["files"]
        sizes = {name: os.stat(name, dir_fd=fd).st_size for name in os.listdir(fd)}
        wrong = [name for name, record in files.items() if sizes.get(name) != record["size"]]
    except FileNotFoundError as error:
        wrong = [str(error)]
    try:
        return wrong if os.path.samestat(os.fstat(fd), (directory / tag).stat()) else []
    except FileNotFoundError:
        return []
    finally:
        os.close(fd)


def watch(directory: Path, jobs: list[subprocess.Popen[str]], tags: list[str]) -> list[str]:
    """Looks at the tags until all jobs have ended. Returns what was wrong."""
    wrong = []
    while any(job.poll() is None for job in jobs):
        wrong += [f"'{tag}' lacks {missing}" for tag in tags if (missing := lacks(directory, tag))]
    return wrong + [said for job in jobs if (said := job.communicate()[1])]


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_any_order_of_the_steps_of_two_programs_keeps_what_is_there(fault_shim, tmp_path, scenario, stride):
    """Each stops where the other is in the midst of its call. Every seventh order; all of them in the slow tests."""
    paths = os.pathsep.join([str(HARNESS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "LD_PRELOAD": str(fault_shim), "PYTHONPATH": paths}
    command = [sys.executable, HARNESS / "interleaved.py", tmp_path, scenario, str(stride)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["wrong"] == []
    assert report["orders"] > 100 / stride


@pytest.mark.parametrize("more", [{}, {"FAULT_NO_EXCHANGE": "1"}], ids=["exchange", "no exchange"])
@pytest.mark.parametrize(
    "tags",
    [
        ["shared", "shared"],
        pytest.param(["a", "b"], marks=pytest.mark.slow),
        pytest.param(["shared", "shared2", "shared"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_jobs_that_save_into_one_folder_do_not_harm_each_other(fault_shim, tmp_path, tags, more):
    """Each job sweeps before it saves, in the midst of what the others have under way."""
    directory = tmp_path / "checkpoints"
    jobs = [start(fault_shim, directory, "save", SAVES, tag, **more) for tag in tags]
    assert watch(directory, jobs, tags) == []
    assert [job.returncode for job in jobs] == [0] * len(tags)
    sweep(directory)
    assert names(directory) == sorted({*tags, "latest"})
    assert {found.tag for found in checkpoints(directory)} == set(tags)
    for found in checkpoints(directory):
        version_of(found)


def test_who_prunes_removes_nothing_that_has_become_new(fault_shim, tmp_path):
    """A tag that was old when it was looked at may be the newest when it is to be removed."""
    directory = tmp_path / "checkpoints"
    saver = start(fault_shim, directory, "save", SAVES, "a", "b", "c")
    pruners = [start(fault_shim, directory, "prune") for _ in range(2)]
    wrong = watch(directory, [saver], ["a", "b", "c"])
    (tmp_path / "done").touch()
    wrong += watch(directory, pruners, ["a", "b", "c"])
    assert wrong == []
    sweep(directory)
    assert version_of(find(directory, None)) == SAVES


# -- claims


def test_what_is_under_way_is_not_swept(tmp_path):
    save(tmp_path, "a", 1)
    staging = Staging(tmp_path, "a")
    staging.create()
    before = names(tmp_path)
    fill(staging.path, "a", 2)
    assert sweep(tmp_path) == []
    assert names(tmp_path) == before
    staging.publish()
    assert names(tmp_path) == ["a", "latest"]
    assert version_of(find(tmp_path, "a")) == 2


def test_a_new_claim_is_not_swept_before_it_is_locked(tmp_path):
    """Between the making and the locking of its file others may take it for one that was left behind."""
    with ThreadPoolExecutor(1) as pool:
        stop = Event()
        sweeping = pool.submit(lambda: [sweep(tmp_path) for _ in iter(stop.is_set, True)])
        for _ in range(2000):
            claim = new_claim(tmp_path)
            is_there, taken = claim.path.exists(), take_over(tmp_path, claim.token)
            claim.release()
            if not is_there or taken is not None:
                break
        stop.set()
        sweeping.result()
    assert is_there and taken is None


def test_two_who_remove_the_same_folder_both_succeed(tmp_path):
    for number in range(1000):
        (tmp_path / "folder" / f"deep{number % 10}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / f"deep{number % 10}" / str(number)).touch()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(remove, [tmp_path / "folder"] * 3))
    assert names(tmp_path) == []


def test_a_lock_that_nobody_holds_protects_nothing(tmp_path):
    save(tmp_path, "a", 1).rename(tmp_path / ".a.partial-0123abcd")
    (tmp_path / ".lock-0123abcd").touch()
    (tmp_path / ".lock-0123abce").touch()
    assert sweep(tmp_path) == [tmp_path / ".a.partial-0123abcd"]
    assert names(tmp_path) == ["latest"]


def test_a_lock_that_is_none_is_told_and_left_alone(tmp_path, caplog):
    (tmp_path / ".lock-0123abcd").symlink_to("elsewhere")
    (tmp_path / ".a.partial-0123abcd").mkdir()
    assert sweep(tmp_path) == []
    assert names(tmp_path) == [".a.partial-0123abcd", ".lock-0123abcd"]
    assert str(tmp_path / ".lock-0123abcd") in caplog.text


def test_without_locks_what_is_young_stays(fault_shim, tmp_path):
    directory = tmp_path / "checkpoints"
    save(directory, "old", 1).rename(directory / ".old.partial-00000001")
    save(directory, "young", 1).rename(directory / ".young.partial-00000002")
    for number in (1, 2):
        (directory / f".lock-0000000{number}").touch()
    before = (directory / ".lock-00000001").stat().st_mtime - MIN_AGE_S - 60
    os.utime(directory / ".lock-00000001", (before, before))
    job = start(fault_shim, directory, "save", 1, "a", FAULT_NO_LOCKS="1")
    assert job.communicate()[1] == ""
    assert names(directory) == [".lock-00000002", ".young.partial-00000002", "a", "latest"]


def test_a_folder_that_is_not_whole_is_not_published(tmp_path):
    """Somebody else may remove files of a save that is under way."""
    save(tmp_path, "a", 1)
    for damage in (Path.unlink, lambda path: os.truncate(path, 7)):
        staging = Staging(tmp_path, "a")
        staging.create()
        fill(staging.path, "a", 2)
        damage(staging.path / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"'a' is not whole, and so does not .*model\.saf"):
            staging.publish()
        staging.discard()
        assert names(tmp_path) == ["a", "latest"]
        assert version_of(find(tmp_path, None)) == 1
