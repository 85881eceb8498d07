"""docs/checkpoint-format.md: its reader, without Partita, reads what layout.py and manifest.py lay out."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from cryptography.exceptions import InvalidTag
from partita.checkpoint.layout import TensorSpec, index_text, lay_out
from partita.checkpoint.manifest import FileRecord, Manifest, manifest_text
from partita.device import kernels
from partita.model import DTYPE_NAMES
from resumed import config_for, engine_for, take_steps
from torch import Tensor

PAGE = Path(__file__).parents[2] / "docs" / "checkpoint-format.md"
UNSEAL, READER, JOIN = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def stranger(name: str) -> Callable[..., Any]:
    """A function of the page."""
    names: dict[str, Any] = {}
    exec(UNSEAL + READER + JOIN, names)
    found: Callable[..., Any] = names[name]
    return found


def digests(data: bytes, lengths: Sequence[int]) -> list[tuple[int, str]]:
    found, end = [], 0
    for length in lengths:
        found.append((length, xxhash.xxh3_64_hexdigest(data[end : end + length])))
        end += length
    return found


def write_checkpoint(directory: Path, tag: str, tensors: dict[str, dict[str, Tensor]], max_bytes: int) -> Path:
    """A checkpoint whose data lie in chunks of 7 bytes, which no tensor heeds."""
    folder = directory / tag
    folder.mkdir(parents=True)
    records = {}

    def add(name: str, data: bytes, first: int) -> None:
        (folder / name).write_bytes(data)
        rest = len(data) - first
        lengths = [first] * (first > 0) + [7] * (rest // 7) + [rest % 7] * (rest % 7 > 0)
        records[name] = FileRecord(size=len(data), chunks=digests(data, lengths))

    for stem, named in tensors.items():
        specs = [TensorSpec(name, DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in named.items()]
        files = lay_out(stem, specs, max_bytes)
        for file in files:
            raw = b"".join(bytes(named[name].contiguous().view(-1).view(torch.uint8).tolist()) for name in file.begin)
            add(file.name, file.header + raw, len(file.header))
        if text := index_text(files):
            add(f"{stem}.safetensors.index.json", text.encode(), 0)
    state = {"sections": {"step": {"steps": 12}}, "ranks": [{}, {}], "client_state": {"epoch": 3}, "aliases": {}}
    add("state.json", json.dumps(state).encode(), 0)
    add("empty", b"", 0)
    manifest = Manifest(
        tag=tag, step=12, samples=96, world_size=2, created="2026-01-31T12:00:00Z", engine={}, files=records
    )
    (folder / "manifest.json").write_text(manifest_text(manifest))
    (directory / "latest").write_text(tag)
    return folder


def masters() -> Tensor:
    """Ties between two bf16 numbers are among them, negative numbers and the smallest ones."""
    bits = torch.arange(-(2**31), 2**31, 2**31 // 500, dtype=torch.int64, device="cpu").to(torch.int32)
    ties = bits & -65536 | 0x8000
    values = torch.cat([bits, ties, ties - 1]).view(torch.float32)
    return values[values.isfinite() & (values.abs() < 3e38)]


def tensors_of_a_run() -> dict[str, dict[str, Tensor]]:
    weights = masters()
    params = torch.empty(weights.shape, dtype=torch.bfloat16, device="cpu")
    remainder = torch.empty(weights.shape, dtype=torch.int16, device="cpu")
    kernels.split_master(params, weights, remainder)
    generator = torch.Generator().manual_seed(0)
    model = {f"{i}.{dtype}": torch.ones((3, 5), dtype=dtype, device="cpu") for i, dtype in enumerate(DTYPE_NAMES)}
    model |= {"scale": torch.full((), 2.5, dtype=torch.float32, device="cpu"), "embedding/\u00e9.weight": params}
    model["none"] = torch.empty((0, 4), dtype=torch.int64, device="cpu")
    optimizer = {
        "remainder/embedding/\u00e9.weight": remainder,
        "exp_avg/scale": torch.full((), 0.5, dtype=torch.float32, device="cpu"),
        "exp_avg/embedding/\u00e9.weight": torch.randn(
            weights.shape, generator=generator, dtype=torch.float32, device="cpu"
        ),
    }
    return {"model": model, "optimizer": optimizer}


def same(read: Any, tensor: Tensor) -> bool:
    """Whether numpy's array has the tensor's shape and bits."""
    bits = bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
    return read.shape == tuple(tensor.shape) and read.tobytes() == bits


def test_the_reader_has_thirty_lines_and_no_part_of_partita():
    assert READER.count("\n") <= 30
    imported = [node for node in ast.walk(ast.parse(READER + JOIN)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {ast.unparse(node) for node in imported} == {
        "import json",
        "import numpy as np",
        "import xxhash",
        "from pathlib import Path",
    }


@pytest.mark.parametrize("max_bytes", [5_000_000_000, 500], ids=["one file", "many files"])
def test_a_stranger_reads_every_tensor_and_the_state(tmp_path, max_bytes):
    run = tensors_of_a_run()
    folder = write_checkpoint(tmp_path, "step12", run, max_bytes)
    assert (len(list(folder.glob("*.safetensors"))) == 2) == (max_bytes > 500)
    state, model, optimizer = stranger("read")(tmp_path)
    assert state["client_state"] == {"epoch": 3}
    assert list(model) == list(run["model"])
    assert list(optimizer) == list(run["optimizer"])
    for read, written in ((model, run["model"]), (optimizer, run["optimizer"])):
        assert all(same(read[name], tensor) for name, tensor in written.items())


def test_a_stranger_joins_split_masters(tmp_path):
    run = tensors_of_a_run()
    write_checkpoint(tmp_path, "step12", run, 5_000_000_000)
    _, model, optimizer = stranger("read")(tmp_path)
    name = "embedding/\u00e9.weight"
    joined = stranger("join")(model[name], optimizer[f"remainder/{name}"])
    assert joined.dtype == np.float32
    assert same(joined, masters())
    assert (run["optimizer"][f"remainder/{name}"] < 0).any()


@pytest.mark.parametrize("tag", ["older", "step12"])
def test_a_stranger_finds_a_tag(tmp_path, tag):
    write_checkpoint(tmp_path, tag, tensors_of_a_run(), 500)
    (tmp_path / "latest").write_text("another")
    state, *_ = stranger("read")(tmp_path, tag)
    assert state["ranks"] == [{}, {}]


def test_a_stranger_notices_a_bit_anywhere(tmp_path):
    folder = write_checkpoint(tmp_path, "step12", tensors_of_a_run(), 500)
    read = stranger("read")
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for at in range(0, len(data), len(data) // 3 + 1) if path.name != "manifest.json" else ():
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            with pytest.raises(AssertionError, match=re.escape(path.name)):
                read(tmp_path)
        path.write_bytes(data)
    read(tmp_path)


def test_a_stranger_notices_a_shorter_file(tmp_path):
    folder = write_checkpoint(tmp_path, "step12", tensors_of_a_run(), 5_000_000_000)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 1)
    with pytest.raises(AssertionError, match=r"model\.safetensors"):
        stranger("read")(tmp_path)


def test_a_stranger_opens_an_encrypted_checkpoint(tmp_path, monkeypatch):
    """Every file is then that of a plain checkpoint of the same run."""
    key = bytes(range(32))
    monkeypatch.setenv("A_KEY", key.hex())
    files = []
    for encryption in ({"key_env": "A_KEY"}, None):
        engine = engine_for(config_for(1, 1, "split", checkpoint={"encryption": encryption}), seed=1)
        take_steps(engine, 1)
        folder = engine.save_checkpoint(tmp_path / str(encryption is None))
        engine.destroy()
        plain = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
        files.append(plain if encryption is None else stranger("unseal")(folder, key))
    assert files[0] == files[1]
    with pytest.raises(InvalidTag):
        stranger("unseal")(tmp_path / "False" / "global_step1", key[::-1])
