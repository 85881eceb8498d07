"""How large a collective is where the config does not say. Pure.

[Note: bucket sizes]
A reduce-scatter or an all-gather takes a latency and its bytes over the bandwidth: NCCL's own model of it. In a ring of
N ranks the latency is that of N - 1 steps, of some microseconds each, and what a step moves is the slice of one rank.
So the slice decides how much of the bandwidth is used. 4 MiB, as much as a NCCL buffer has, take 10 us over NVLink and
80 us through a network card of 50 GB/s: the latency is a small part of either. That is 32 MiB for 8 ranks, the size of
DDP's buckets (25 MiB), and more across hosts, where steps are slower and more. Two things bound a bucket from above:
nothing goes on beside the last one of a backward, and stages 2 and 3 have two full buckets as staging.

On a CPU the ranks of a host reduce in shared memory, in the caches' reach, and latency is a microsecond: there the size
that was measured best stays for any number of ranks.
"""

from __future__ import annotations

ON_CPU = 8_388_608
# Elements, of 2 bytes as a rule.
ON_GPU, MOST_ON_GPU = 16_777_216, 134_217_728  # 32 MiB and 256 MiB
OF_A_SLICE = 2_097_152  # 4 MiB


def default_bucket_size(device_type: str, ranks: int) -> int:
    """Elements per collective on a kind of device ("cpu", "cuda"). See [Note: bucket sizes].

    Args:
        ranks: that share the work, the data-parallel ones.
    """
    return ON_CPU if device_type == "cpu" else min(max(ON_GPU, OF_A_SLICE * ranks), MOST_ON_GPU)
