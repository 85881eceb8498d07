"""C5, C6, C7, O3: what is in the files, who opens them, and what is left out when they are loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import partita
import pytest
import torch
from resumed import Model, Numbers, config_for, differences, engine_for, take_steps, train_and_save, whole_state
from safetensors.torch import load_file, safe_open
from torch import nn

TAG = "global_step3"


def _without_a_word_between(folder: str, stage: int, precision: str) -> dict[str, Any]:
    engine = engine_for(config_for(2, stage, precision), seed=1)
    take_steps(engine, 3)
    engine.save_checkpoint(folder)
    state = whole_state(engine, "AdamW")
    engine.destroy()
    return state


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "split"), (3, "bf16"), (3, "fp16")])
def test_the_files_are_the_live_weights(ranks, tmp_path, stage, precision):
    """A strict load works: frozen, tied, odd sizes, without elements, buffers. A file is its header and its values."""
    live = ranks(2).run(_without_a_word_between, str(tmp_path), stage, precision)[0]
    weights = load_file(tmp_path / TAG / "model.safetensors")
    aliases = json.loads((tmp_path / TAG / "state.json").read_text())["aliases"]
    assert aliases == {"tied.weight": "layers.0.weight"}
    model = Model(2)
    names = model.state_dict().keys()
    assert weights.keys() | aliases.keys() == names and not weights.keys() & aliases.keys()
    for name in names:
        assert torch.equal(weights[aliases.get(name, name)], live[f"weight {name}"]), name
        assert weights[aliases.get(name, name)].dtype == live[f"weight {name}"].dtype
    model.load_state_dict({name: weights[aliases.get(name, name)] for name in names}, strict=True)
    states = load_file(tmp_path / TAG / "optimizer.safetensors")
    assert torch.equal(states["exp_avg/layers.1.weight"], live["exp_avg layers.1.weight"])
    assert not [name for name in states if "cache" in name]  # a buffer that no state dict has
    if precision in ("bf16", "fp16"):
        assert torch.equal(states["weight/one"], live["master one"])
    for stem, tensors in (("model", weights), ("optimizer", states)):
        file = tmp_path / TAG / f"{stem}.safetensors"
        header = int.from_bytes(file.read_bytes()[:8], "little")
        assert file.stat().st_size == 8 + header + sum(value.nbytes for value in tensors.values())


def _gpt2(folder: str, stage: int) -> dict[str, Any]:
    import transformers

    torch.manual_seed(0)
    sizes = {"n_embd": 20, "n_layer": 2, "n_head": 2, "vocab_size": 51, "n_positions": 32}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config)
    engine = partita.Engine(model, config={**config_for(2, stage, "bf16"), "scheduler": None})
    ids = torch.arange(16).view(2, 8)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    path = engine.save_checkpoint(folder, "step")
    weights = engine.module_state_dict()
    if engine.global_rank == 0:
        config.save_pretrained(path)
    engine.destroy()
    return weights


@pytest.mark.parametrize("stage", [1, 3])
def test_from_pretrained_opens_a_checkpoint(ranks, tmp_path, stage):
    transformers = pytest.importorskip("transformers")
    weights = ranks(2).run(_gpt2, str(tmp_path), stage)[0]
    model, loading = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "step", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    loaded = model.state_dict()
    assert loaded.keys() == weights.keys()
    assert [name for name, value in weights.items() if not torch.equal(loaded[name], value)] == []


def _parts(folder: str, config: dict[str, Any]) -> dict[str, Any]:
    """Parts of a checkpoint of step 3 in a run that is in step 1."""
    found = {}
    for name, options in {
        "weights": {"load_module_only": True},
        "no states": {"load_optimizer_states": False},
        "no schedule": {"load_lr_scheduler_states": False},
    }.items():
        engine = engine_for(config, seed=2)
        take_steps(engine, 1)
        found[f"{name} before"] = whole_state(engine, "AdamW")
        engine.load_checkpoint(folder, **options)
        found[name] = whole_state(engine, "AdamW")
        engine.destroy()
    return found


@pytest.mark.parametrize("precision", ["fp32", "split", "bf16"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_parts_can_be_left_out(ranks, tmp_path, stage, precision):
    config = config_for(2, stage, precision)
    saved = ranks(2).run(train_and_save, str(tmp_path), config)[0]
    found = ranks(2).run(_parts, str(tmp_path), config)[1]
    kinds = {"weights": ("exp_avg", "counts"), "no states": ("exp_avg",), "no schedule": ()}
    for name, kept in kinds.items():
        for what, value in found[name].items():
            source = found[f"{name} before"] if what.startswith(kept or ("-",)) else saved
            if what == "counts" and name != "weights":
                assert value[:2] == source[what][:2]
            else:
                assert not differences({what: value}, {what: source[what]}), f"{name}: {what}"
    rates = {name: found[name]["counts"][3] for name in kinds}
    assert rates["weights"] == found["weights before"]["counts"][3] != saved["counts"][3]
    assert rates["no states"] == saved["counts"][3]


def _first_step(folder: str, config: dict[str, Any], lr: float) -> tuple[float, float]:
    """The largest change of a weight in the step after weights and counters were loaded without moments."""
    torch.manual_seed(2)
    optimizer = {"type": "AdamW", "params": {"lr": lr, "weight_decay": 0.0}}
    engine = partita.Engine(Model(2), train_data=Numbers(), config={**config, "optimizer": optimizer})
    engine.load_checkpoint(folder, load_optimizer_states=False, load_lr_scheduler_states=False)
    before = engine.module_state_dict()
    engine.train_batch()
    after = engine.module_state_dict()
    moved = [
        (after[n] - before[n]).abs().max().item()
        for n, p in engine.module.named_parameters()
        if p.numel() and p.requires_grad
    ]
    steps = engine.global_steps
    engine.destroy()
    assert steps == 21
    return max(moved), min(moved)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_adam_without_moments_begins_anew(ranks, tmp_path, stage):
    """With a learning rate of 0 nothing moves. Otherwise the first step has the size of a first step, the learning
    rate, although the run is in its 21st: without moments the bias correction of step 21 would make it three times
    that."""
    config = {**config_for(2, stage, "fp32"), "scheduler": None}
    ranks(2).run(train_and_save, str(tmp_path), config, "AdamW", 20)
    assert ranks(2).run(_first_step, str(tmp_path), config, 0.0)[0] == (0.0, 0.0)
    largest, smallest = ranks(2).run(_first_step, str(tmp_path), config, 1e-3)[0]
    assert 0.9e-3 < smallest <= largest < 1.1e-3


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(8)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().mean()


def _read_bytes(folder: str, config: dict[str, Any], saves: bool) -> int:
    """The bytes that this process reads while it loads."""
    torch.manual_seed(0)
    engine = partita.Engine(Wide(), config=config)
    if saves:
        engine.backward(engine(torch.ones(2, 512)))
        engine.step()
        engine.save_checkpoint(folder, "step")
    before = _rchar()
    engine.load_checkpoint(folder, "step")
    read = _rchar() - before
    engine.destroy()
    return read


def _rchar() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("stage", [1, 3])
def test_a_rank_reads_its_own_bytes(ranks, tmp_path, stage):
    """Weights and moments of its shard, twice: checked and then taken; with other ranks also the rest of the chunks at
    the ends of its parts."""
    config = {**config_for(2, stage, "fp32", bucket=10**6), "scheduler": None}
    numel = 8 * 512 * 512
    for read in ranks(2).run(_read_bytes, str(tmp_path), config, True):
        assert 2 * 12 * numel / 2 <= read < 1.01 * 2 * 12 * numel / 2 + 100_000
    config = {**config_for(3, stage, "fp32", bucket=10**6), "scheduler": None}
    units, quantities, megabyte = 3, 3, 2**20
    for read in ranks(3).run(_read_bytes, str(tmp_path), config, False):
        own = 2 * 12 * numel / 3
        assert 0.9 * own <= read < 1.1 * own + 2 * units * quantities * 2 * megabyte


@pytest.mark.slow
def test_eleven_ranks(ranks, tmp_path):
    """C6: rank 10 does not come before rank 2."""
    config = {**config_for(1, 2, "fp32"), "train_batch_size": 11, "train_micro_batch_size_per_gpu": 1}
    saved = ranks(11).run(train_and_save, str(tmp_path), config)[0]
    engine_state = ranks(2).run(_loaded, str(tmp_path), config_for(2, 3, "fp32"))[0]
    assert differences(engine_state, saved, leave_out="counts") == []
    numbers = [
        one["random"]["torch"]["tensor"]["data"]
        for one in json.loads((tmp_path / TAG / "state.json").read_text())["ranks"]
    ]
    assert len(numbers) == 11


def _loaded(folder: str, config: dict[str, Any]) -> dict[str, Any]:
    engine = engine_for(config, seed=2)
    engine.load_checkpoint(folder)
    state = whole_state(engine, "AdamW")
    engine.destroy()
    return state


def test_the_headers_say_that_torch_wrote_them(ranks, tmp_path):
    ranks(1).run(train_and_save, str(tmp_path), config_for(1, 0, "fp32"))
    with safe_open(tmp_path / TAG / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
