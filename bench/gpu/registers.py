"""What ptxas makes of the kernels: registers, memory in place of registers, threads per multiprocessor. Needs no GPU.

    python bench/gpu/registers.py [--architectures 80,90,100] [--json FILE]

Exit status 1 if a kernel keeps registers in memory ("spills") or has a stack. CI's build, of the preset `release`, ends
with an error then; this says which kernel it is.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REGISTERS, WARP = 65536, 32  # of a multiprocessor; registers of a warp are given out by 256
OPTIONS = ["-std=c++17", "-O3", "-DNDEBUG", "-fmad=false", "-Xptxas=-v", "-Icpp/include", "-Icpp/src", "-Icuda"]
MARKS = ["-DPARTITA_HOST_DEVICE=__host__ __device__", "-DPARTITA_DEVICE=__device__"]  # as CMakeLists.txt has them
FIGURES = re.compile(
    r"Function properties for (?P<name>\S+)\n\s+(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\nptxas info\s*: Used (?P<registers>\d+) registers"
)


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel; bytes are per thread."""

    name: str
    architecture: str
    registers: int
    stack_bytes: int
    spill_bytes: int

    @property
    def warps(self) -> int:
        """How many warps the registers of a multiprocessor are enough for."""
        return min(64, REGISTERS // (-(-self.registers * WARP // 256) * 256))


def figures_in(text: str, architecture: str) -> list[Kernel]:
    """The kernels that the output of `ptxas -v` tells of, by their mangled names."""
    return [
        Kernel(found["name"], architecture, int(found["registers"]), int(found["stack"]),
               int(found["stores"]) + int(found["loads"]))
        for found in FIGURES.finditer(text)
    ]  # fmt: skip


def compiled(source: Path, architecture: str) -> list[Kernel]:
    with tempfile.TemporaryDirectory() as folder:
        target = ["-cubin", f"-arch=sm_{architecture}", str(source), "-o", f"{folder}/kernels.cubin"]
        done = subprocess.run(["nvcc", *OPTIONS, *MARKS, *target], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return figures_in(done.stderr, architecture)


def readable(names: list[str]) -> list[str]:
    """Names as the source has them, without namespaces and parameters."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    plain = [
        re.sub(r"partita::|cuda::|\(anonymous namespace\)::|^void ", "", line) for line in done.stdout.splitlines()
    ]
    return [line.partition("(")[0].replace("> >", ">>") for line in plain]


def table(kernels: list[Kernel], architectures: list[str]) -> str:
    """In Markdown: a line per kernel, a column per architecture."""
    by_name: dict[str, dict[str, Kernel]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, {})[kernel.architecture] = kernel
    lines = ["| kernel | " + " | ".join(f"sm_{each}" for each in architectures) + " |"]
    lines.append("| --- |" + " --- |" * len(architectures))
    lines += [f"| `{name}` | " + " | ".join(_cell(of[each]) for each in architectures) + " |"
              for name, of in sorted(by_name.items())]  # fmt: skip
    return "\n".join(lines)


def _cell(kernel: Kernel) -> str:
    spills = f", **{kernel.spill_bytes} B spilled**" if kernel.spill_bytes or kernel.stack_bytes else ""
    return f"{kernel.registers} registers, {kernel.warps * WARP} threads{spills}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=lambda text: text.split(","), default=["80", "90", "100"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    kernels = [
        kernel
        for source in sorted((ROOT / "cuda").glob("*.cu"))
        for architecture in arguments.architectures
        for kernel in compiled(source, architecture)
    ]
    names = dict(zip((k.name for k in kernels), readable([k.name for k in kernels]), strict=True))
    kernels = [Kernel(**{**asdict(kernel), "name": names[kernel.name]}) for kernel in kernels]
    print(table(kernels, arguments.architectures))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(kernel) for kernel in kernels], indent=1) + "\n")
    spilling = [k for k in kernels if k.spill_bytes or k.stack_bytes]
    sys.exit(
        "registers in memory: " + ", ".join(f"{k.name} (sm_{k.architecture})" for k in spilling) if spilling else 0
    )


if __name__ == "__main__":
    main()
