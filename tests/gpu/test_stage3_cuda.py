"""Stage 3 on a GPU, of a process that gathers although it is alone: memory, waits and waiting streams."""

from __future__ import annotations

from typing import Any

import inside
import pytest
import torch
from device_runs import FP16, HOST, SPLIT, WHOLE, Deep, assert_same, engine_of, samples, state_of
from on_gpu import CPU, CUDA, NEEDS_CUDA, nobody_waits, on_both_devices
from torch import nn

LIBRARY_BYTES = 40 * 2**20  # what the matrix library may take for one product


def settings(width: int, **zero: Any) -> dict[str, Any]:
    """One unit per block, and one block gathered ahead."""
    changes = {"reduce_bucket_size": 2 * width**2, "stage3_prefetch_bucket_size": width**2, **zero}
    return {"stage": 3, "zero_optimization": changes}


def start_measuring(device: torch.device) -> int:
    """What tensors take on a GPU from now on is compared with this; on the CPU nobody counts, and it is nothing."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return int(torch.cuda.memory_allocated(device))


def peak_bytes(device: torch.device) -> int:
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0


def use_libraries(device: torch.device, width: int) -> None:
    """Workspaces of the matrix library are there, those of the backward's thread too."""
    warm = nn.Linear(width, width, dtype=torch.bfloat16, device=device)
    warm(samples(0, 2, device, width).bfloat16()).sum().backward()


SIZES = pytest.mark.parametrize(
    "device, blocks, width", [(CPU, 6, 16), pytest.param(CUDA, 48, 1024, marks=NEEDS_CUDA)], ids=["cpu", "cuda"]
)
# What is kept of a parameter on the device: the shard, its gradient, a master or the bits that it lacks, two moments.
FORMULAS = [(WHOLE, {}, 16), (SPLIT, {}, 14), (WHOLE, {"offload_optimizer": HOST}, 2)]
FORMULAS += [(WHOLE, {"offload_optimizer": HOST, "offload_param": HOST}, 0)]


@pytest.mark.parametrize("precision, zero, bytes_each", FORMULAS, ids=["whole", "split", "optimizer", "parameters"])
@SIZES
def test_memory_is_the_states_and_a_few_blocks(device, blocks, width, precision, zero, bytes_each):
    """Whole parameters would add 2 bytes each, gradients that stay as many."""
    use_libraries(device, width)
    empty = start_measuring(device)
    engine = engine_of(Deep(blocks, width).to(device, torch.bfloat16), **precision, **settings(width, **zero))
    inputs = samples(0, 2, device, width)
    engine.train_batch(inputs)  # buffers that are used again are there
    kept = start_measuring(device)
    block_bytes = 2 * (width**2 + width)
    gathered = []
    for block in engine.module.blocks[1:]:  # whose inputs have gradients
        block.register_forward_hook(lambda *_: gathered.append(inside.gathered_bytes(engine)))
        block.register_full_backward_hook(lambda *_: gathered.append(inside.gathered_bytes(engine)))
    for _ in range(3):
        engine.train_batch(inputs)
    assert len(gathered) == 6 * (blocks - 1)
    assert block_bytes <= max(gathered) <= 3 * block_bytes, max(gathered) / block_bytes
    assert inside.gathered_bytes(engine) == 0
    # Kept: the states, and two buffers for gradients on their way.
    assert kept - empty <= 1.01 * bytes_each * blocks * block_bytes / 2 + 4 * block_bytes
    # Above that: blocks that are here or come, gradients of two, small activations.
    assert peak_bytes(device) - kept <= 8 * block_bytes + LIBRARY_BYTES
    engine.destroy()


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("precision", [{}, WHOLE, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.pairwise
@SIZES
def test_steps_with_gathers_ahead_wait_for_nothing(device, blocks, width, precision, recomputed):
    """And have the bits of stage 0: two micro-batches, clipping, some blocks gathered while others compute."""
    shared: dict[str, Any] = {**precision, "gradient_accumulation_steps": 2, "gradient_clipping": 0.5}
    seen = []
    for stage in (0, 3):
        changes = settings(width) if stage else {}
        if recomputed:
            changes["activation_checkpointing"] = {"enabled": True}
        engine = engine_of(Deep(min(blocks, 12), width).to(device), **shared, **changes)
        batches = [samples(step, 4, device, width) for step in range(5)]
        for batch in batches[:2]:
            engine.train_batch(batch)
        with nobody_waits(device):
            for batch in batches[2:]:
                engine.train_batch(batch)
        seen.append(state_of(engine))
        engine.destroy()
    assert_same(seen[1], seen[0])


@on_both_devices
def test_parameters_are_whole_where_a_program_asks(device):
    """GatheredParameters reads and writes on the device; the next step goes on from what was written."""
    from partita.zero import GatheredParameters

    engine = engine_of(Deep(4, 16).to(device), **settings(16))
    engine.train_batch(samples(0, 2, device, 16))
    first = engine.module.blocks[0].weight
    with GatheredParameters([first], modifier_rank=0):
        assert first.device == device and first.shape == (16, 16)
        first.data.fill_(0.5)
    assert torch.equal(state_of(engine)["blocks.0.weight"], torch.full((16, 16), 0.5))
    engine.train_batch(samples(1, 2, device, 16))
    moved = state_of(engine)["blocks.0.weight"]
    assert 0 < (moved - 0.5).abs().max() < 0.1
    engine.destroy()
