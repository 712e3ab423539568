"""In front of a real vLLM, which has an environment of its own: `benchmarks/peers/setup.sh vllm`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
VARIABLE = "LORAMUX_VLLM_PYTHON"
#: Nats between two programs on the same factors, and the type of number.
LIMITS = {"float32": 1e-4, "bfloat16": 1e-2}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    interpreter = os.environ.get(VARIABLE)
    if not interpreter:
        pytest.skip(f"{VARIABLE} names no interpreter with vLLM")
    file = tmp_path_factory.mktemp("vllm") / "backends.json"
    command = [sys.executable, ROOT / "benchmarks" / "backends.py", "--vllm", interpreter, "--save", file]
    subprocess.run([*command, "--tokens", "8", "--rounds", "1"], check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("kind", ["base", "one expert", "two experts", "three experts"])
def test_blends_answer_as_pefts_concatenation(measured: dict[str, Any], dtype: str, kind: str) -> None:
    far = measured[dtype]["logprobs"][kind]
    # What vLLM says of the adapter is passed on; alone, it computes a request the same way every time.
    assert far["vllm"]["max"] <= LIMITS[dtype]
    assert far[dtype]["mean"] <= LIMITS[dtype]
    if dtype == "float32":
        assert far["float32"]["max"] <= LIMITS["float32"]


@pytest.mark.timeout(3600)
def test_sixteen_requests_over_eight_blends_are_answered(measured: dict[str, Any]) -> None:
    for dtype in LIMITS:
        assert measured[dtype]["throughput"]["of_vllm"] > 0.2
