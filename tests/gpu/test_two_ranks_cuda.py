"""Two ranks on one GPU. NCCL refuses that, but gloo carries tensors of a GPU through the host: collectives between
ranks on memory and streams of the GPU, in all stages. Without a GPU the same runs are on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import partita
import pytest
import torch
from device_runs import FP16, WHOLE, Deep, config, samples, state_of
from on_gpu import CPU, CUDA, on_both_devices
from one_as_several import over
from ranks import RankPool

WIDTH = 16
PRECISIONS = {"fp32": {}, "bf16": WHOLE, "fp16": FP16}
HOST = {"device": "cpu"}
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "0": (0, {}),
    "1": (1, {}),
    "1, gathers overlap": (1, {"overlap_gather": True}),
    "2": (2, {}),
    "3": (3, {}),
    "2, offloaded": (2, {"offload_optimizer": HOST}),
    "3, offloaded": (3, {"offload_optimizer": HOST, "offload_param": HOST}),
}


@pytest.fixture(scope="module")
def pool_for(ranks: Callable[[int], RankPool]) -> Iterator[Callable[[torch.device], RankPool]]:
    """pool_for(device): two ranks. A process that was forked cannot use a GPU."""
    fresh = RankPool(2, "torch", fresh=True)
    yield lambda device: ranks(2) if device == CPU else fresh
    fresh.close()


def _trained(device: torch.device, precision: str, kinds: list[str]) -> dict[str, Any]:
    """By kind: losses of this rank, and the weights, of four steps of one micro-batch."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    results = {}
    for kind in kinds:
        stage, zero = KINDS[kind]
        zero = {"reduce_bucket_size": 300, "stage3_prefetch_bucket_size": 300, **zero}
        settings = config(stage, gradient_clipping=0.5, zero_optimization=zero, **PRECISIONS[precision])
        with over(device, "gloo"):
            engine = partita.Engine(Deep(3, WIDTH).to(device), config=settings)
        losses = []
        for step in range(4):
            batch = samples(step, 4, device, WIDTH)
            loss = engine(batch.chunk(2)[engine.global_rank])
            engine.backward(loss * float("nan") if step == 1 and engine.global_rank == 1 else loss)
            engine.step()
            losses.append(loss.detach())
        assert engine.skipped_steps == 1
        results[kind] = [loss.item() for loss in losses], state_of(engine)
        engine.destroy()
    return results


@pytest.mark.parametrize("precision", PRECISIONS)
@on_both_devices
def test_all_stages_train_the_same_bits_on_two_ranks(pool_for, device, precision):
    """Promise 1, over whole collectives of torch.distributed; one step is skipped as one rank overflows. And the
    numbers are those of the CPU, up to the order of sums."""
    ranks = pool_for(device).run(_trained, device, precision, list(KINDS))
    for results in ranks:
        losses, weights = results["0"]
        for kind, (seen_losses, seen) in results.items():
            assert seen_losses == losses, kind
            for name, value in weights.items():
                assert torch.equal(seen[name], value), (kind, name)
    assert all(torch.equal(value, ranks[1]["0"][1][name]) for name, value in ranks[0]["0"][1].items())
    if device == CUDA and precision == "fp32":
        on_the_cpu = pool_for(CPU).run(_trained, CPU, precision, ["0"])
        torch.testing.assert_close(ranks[0]["0"][1], on_the_cpu[0]["0"][1], rtol=1e-4, atol=1e-5)
