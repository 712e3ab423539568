"""The Triton kernels, compiled for devices that are not here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is published for Linux on x86-64")


def test_compiles_for_devices_that_are_not_here(tmp_path: Path) -> None:
    """The interpreter takes what a compiler may refuse. 99 KiB are what an sm_86 or sm_89 block may have."""
    root = Path(__file__).parents[2]
    # Where the project is on PYTHONPATH and not installed, the child must find it there too.
    paths = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.kernels.compile_kernels"]
    done = subprocess.run(command, check=False, env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 99 * 1024
