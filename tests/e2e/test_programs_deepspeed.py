"""Programs for DeepSpeed, unchanged through `partita run`: as loops in plain torch over the same data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import Net, Pictures
from programs import PROGRAMS, Programs
from torch import Tensor, nn
from warm_python import WarmPython


@pytest.fixture(scope="module")
def programs(python: WarmPython, tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return Programs(python, tmp_path_factory.mktemp("programs"))


def results(programs: Programs, program: str, *arguments: Any, ranks: int = 2) -> dict[str, Any]:
    """What the program wrote into its file of JSON."""
    out = programs.folder / "results.json"
    out.unlink(missing_ok=True)
    programs.run(program, *arguments, "--out", out, ranks=ranks)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def config_file(programs: Programs, **config: Any) -> Path:
    path = programs.folder / "config.json"
    path.write_text(json.dumps({"steps_per_print": 10, "wall_clock_breakdown": False, **config}))
    return path


def batches(data: Pictures, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Global batches of one epoch in the order of DeepSpeed's loader: a permutation with seed 0, in every epoch."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    for chosen in order.split(size):
        yield data.pictures[chosen], data.labels[chosen]


def trained_alone() -> dict[str, Any]:
    """The program `images.py` as a loop on one process, in fp32. The file has what each line of its config means."""
    torch.manual_seed(0)
    net = Net()
    adam = torch.optim.AdamW(net.parameters(), lr=0.01, betas=(0.8, 0.999), weight_decay=3e-7)
    losses, rates = [], [0.0]
    for _ in range(2):
        for inputs, labels in batches(Pictures(96, 2), 16):
            loss = nn.functional.cross_entropy(net(inputs), labels)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            adam.param_groups[0]["lr"] = rates[-1]
            adam.step()
            adam.zero_grad()
            losses.append(loss.item())
            rates.append(0.01 * math.log(len(losses)) / math.log(20))
    test = Pictures(40, 3)
    accuracy = (net(test.pictures).argmax(1) == test.labels).float().mean().item()
    return {"losses": losses, "rates": rates[1:], "accuracy": accuracy}


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("stage", [pytest.param(s, marks=pytest.mark.slow if s != 3 else ()) for s in range(4)])
def test_a_network_for_images_with_the_engines_own_loader(programs, stage, ranks):
    """`add_config_arguments`, `training_data`, `Adam` with a decay, `WarmupLR`, `cpu_offload`."""
    ours = results(programs, "images.py", "--dtype", "fp32", "--stage", stage, ranks=ranks)
    reference = trained_alone()
    assert ours["losses"] == pytest.approx(reference["losses"], rel=1e-4)
    assert ours["rates"] == pytest.approx(reference["rates"])
    assert ours["accuracy"] == pytest.approx(reference["accuracy"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_same_in_16_bits(programs, stage, dtype):
    ours, reference = results(programs, "images.py", "--dtype", dtype, "--stage", stage), trained_alone()
    assert ours["losses"] == pytest.approx(reference["losses"], rel=0.01)
    assert ours["losses"][-1] < 0.98 * ours["losses"][0]


def test_a_pipeline_of_layers_trains_as_the_network(programs):
    """`PipelineModule` over a list with a lambda, cut by parameters; without it, `RepeatingLoader`."""
    adam = {"type": "Adam", "params": {"lr": 0.01, "betas": [0.9, 0.999], "eps": 1e-8}}
    given = [
        "--deepspeed_config",
        config_file(programs, train_batch_size=16, train_micro_batch_size_per_gpu=4, optimizer=adam),
    ]
    stages = results(programs, "pipeline.py", *given, "-p", 2)["losses"]
    assert stages[0] == stages[1]
    whole = results(programs, "pipeline.py", *given, "-p", 0)["losses"]  # 2 ranks x 2 micro-batches a step
    per_step = [sum(rank[2 * step + i] for rank in whole for i in range(2)) / 4 for step in range(4)]
    assert stages[0] == pytest.approx(per_step, rel=1e-4)


def gan_alone() -> list[list[list[float]]]:
    """The losses of `gan.py` by rank, step and network: two replicas in plain torch, gradients as their mean."""
    names: dict[str, Any] = {"__name__": "gan"}
    text = (PROGRAMS / "gan.py").read_text().replace("import deepspeed\n", "")
    exec(compile(text, "gan.py", "exec"), names)
    torch.manual_seed(999)
    first = names["generator"](), names["discriminator"]()
    second = names["generator"](), names["discriminator"]()
    for mine, other in zip(first, second, strict=True):
        other.load_state_dict(mine.state_dict())
    settings: dict[str, Any] = {"lr": 2e-3, "betas": (0.5, 0.999)}
    adams = [torch.optim.Adam(net.parameters(), **settings) for net in first]
    data = [torch.rand(8, 6, 9, generator=torch.Generator().manual_seed(3 + rank)) for rank in range(2)]
    noise = [torch.randn(8, 6, 5, generator=torch.Generator().manual_seed(5 + rank)) for rank in range(2)]
    losses: list[list[list[float]]] = [[], []]
    criterion, one, zero = nn.BCELoss(), torch.ones(6), torch.zeros(6)
    for step in range(8):
        fakes = []
        for rank, (g, d) in enumerate((first, second)):
            d.zero_grad()
            real, fake = criterion(d(data[rank][step]).squeeze(1), one), g(noise[rank][step])
            of_fake = criterion(d(fake.detach()).squeeze(1), zero)
            (real + of_fake).backward()
            losses[rank].append([(real + of_fake).item()])
            fakes.append(fake)
        _step_together(first[1], second[1], adams[1])
        for rank, (g, d) in enumerate((first, second)):
            g.zero_grad()
            of_g = criterion(d(fakes[rank]).squeeze(1), one)
            of_g.backward()
            losses[rank][step].append(of_g.item())
        _step_together(first[0], second[0], adams[0])
    return losses


def _step_together(mine: nn.Module, other: nn.Module, adam: torch.optim.Optimizer) -> None:
    pairs = list(zip(mine.parameters(), other.parameters(), strict=True))
    for p, q in pairs:
        p.grad = (p.grad + q.grad) / 2  # type: ignore[operator]
    adam.step()
    for p, q in pairs:
        q.data.copy_(p.data)


@pytest.mark.parametrize("stage", [pytest.param(s, marks=pytest.mark.slow if s else ()) for s in range(3)])
def test_two_engines_against_each_other(programs, stage):
    """A loss of the generator runs through the discriminator, which the program calls past its engine."""
    file = config_file(
        programs, train_batch_size=12, zero_optimization={"stage": stage}, zero_allow_untested_optimizer=True
    )
    ours = results(programs, "gan.py", "--deepspeed_config", file)["losses"]
    for mine, expected in zip(ours, gan_alone(), strict=True):
        for step, (got, wanted) in enumerate(zip(mine, expected, strict=True)):
            assert got == pytest.approx(wanted, rel=1e-4), step
