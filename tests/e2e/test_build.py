"""The build without what it must not need."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture
def without_nvcc(tmp_path) -> dict[str, str]:
    """An environment whose PATH has compilers and shells, and no nvcc."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in (
        "c++",
        "g++",
        "gcc",
        "cc",
        "as",
        "ld",
        "ar",
        "ranlib",
        "nm",
        "strip",
        "objcopy",
        "objdump",
        "uname",
        "sh",
        "git",
        # Builds of Python packages ask for the compiler that this Python was built with.
        *(str(sysconfig.get_config_var(kind)).split()[0] for kind in ("CC", "CXX")),
    ):
        if (found := shutil.which(name)) is not None and not (tools / name).exists():
            (tools / name).symlink_to(found)
    return {
        **{k: v for k, v in os.environ.items() if k not in ("CUDACXX", "CUDA_HOME", "CUDA_PATH")},
        "PATH": str(tools),
    }


def test_the_wheel_is_built_without_nvcc_and_is_complete(tmp_path, without_nvcc):
    """F2: the extension, its types, the marker; torch is not among the build requirements."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, env=without_nvcc, check=True, timeout=600)
    (wheel,) = tmp_path.glob("partita-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("partita/_core.") and name.endswith(".so") for name in names)
    assert {"partita/_core.pyi", "partita/py.typed", "partita/engine/engine.py"} <= set(names)
    assert not [name for name in names if not name.startswith(("partita/", "partita-"))]


def test_cuda_on_without_nvcc_is_a_fatal_error_that_says_so(tmp_path, without_nvcc):
    cmake = shutil.which("cmake") or str(Path(sys.executable).with_name("cmake"))
    ninja = shutil.which("ninja") or str(Path(sys.executable).with_name("ninja"))
    command = [cmake, "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    options = ["-DPARTITA_CUDA=ON", "-DPARTITA_PYTHON=OFF"]
    done = subprocess.run([*command, *options], env=without_nvcc, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "PARTITA_CUDA=ON needs a working nvcc" in done.stderr
