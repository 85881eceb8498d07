"""A table of ratios after pytest-benchmark's own."""

from __future__ import annotations

from statistics import median
from typing import Any


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = [bench for bench in getattr(session, "benchmarks", []) if "others" in bench.extra_info]
    if not rows:
        return
    write = terminalreporter.write_line
    terminalreporter.section(
        "ours against the copy of the same bytes and the peers (medians; ratio below 1: ours is faster)"
    )
    for bench in rows:
        ours, bytes_moved = list(bench.stats.data), bench.extra_info["bytes"]
        cells = [f"{bench.name:44} {median(ours) * 1e3:8.2f} ms {bytes_moved / median(ours) / 1e9:7.1f} GB/s"]
        for name, times in bench.extra_info["others"].items():
            ratio = median(a / b for a, b in zip(ours, times, strict=True))
            cells.append(f"{name} {median(times) * 1e3:.2f} ms (x{ratio:.2f})")
        write("   ".join(cells))
