"""The whole interface against its own document, by schemathesis over a socket: requests that the document
allows and requests that it does not, the adapter routes included.

`make schema` runs it, with a package index for Python; schemathesis has an environment of its own in
`build/clients`. No 5xx, no status, header or media type that the document does not have, no answer that
breaks its schema. `SCHEMA_EXAMPLES` sets the examples of each operation, 500 without it. What was asked goes
to benchmarks/results/schemathesis.json.
"""

import json
import os
import subprocess
import venv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.peft_format import write_lora
from loramux.server.openapi import OPERATIONS, PATH
from tests.e2e.conftest import Server, serving
from tests.kit import DEMO_POOL
from tests.tiny import random_adapter
from tests.tiny_sparse import random_mixlora, save_mixlora

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / "build" / "clients" / "schemathesis"
RESULT = ROOT / "benchmarks" / "results" / "schemathesis.json"
WHOLE = 500
EXAMPLES = int(os.environ.get("SCHEMA_EXAMPLES", str(WHOLE)))
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)
#: 256 tokens of context, so that what asks for no limit ends soon.
SETTINGS = ["--log-level", "error"]
for _setting in ("admin_key=admin", "engine.kv_tokens=256", "limits.max_n=4", "limits.max_sequences=4"):
    SETTINGS += ["--set", _setting]

pytestmark = [
    pytest.mark.skipif("TRY_SCHEMA" not in os.environ, reason="needs a package index; run by make schema"),
    pytest.mark.timeout(0),
]


@pytest.fixture(scope="module")
def schemathesis() -> Path:
    """The command, installed on first use."""
    if not (ENVIRONMENT / "installed").exists():
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        command = [ENVIRONMENT / "bin" / "pip", "install", "--quiet", "schemathesis>=4.30,<5"]
        subprocess.run(command, check=True)
        (ENVIRONMENT / "installed").touch()
    return ENVIRONMENT / "bin" / "schemathesis"


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Server]:
    """The real command on the tests' pool, with adapters on disk that can be loaded; answers are short."""
    root = tmp_path / "adapters"
    save(root)
    with serving(*SETTINGS, "--set", f"adapter_root={root}") as server:
        yield server


def save(root: Path) -> None:
    """`poetry`, which the document's example names, and a sparse model."""
    shapes = BaseShapes.from_config_dir(DEMO_POOL / "base", "loramux-demo-base")
    write_lora(random_adapter(shapes, 4, "poetry"), root / "poetry", shapes.id)
    save_mixlora(random_mixlora(shapes, "mixture"), root / "mixture", shapes.id)


def test_the_server_keeps_to_its_document(schemathesis: Path, running: Server, tmp_path: Path) -> None:
    report = tmp_path / "report.ndjson"
    command = [
        str(schemathesis), "run", f"{running.url}/openapi.json",
        "--mode", "all", "--phases", "examples,coverage,fuzzing", "--checks", ",".join(CHECKS),
        "--max-examples", str(EXAMPLES), "--seed", "1", "--continue-on-failure", "--workers", "2",
        "--header", "Authorization: Bearer admin", "--request-timeout", "120",
        "--suppress-health-check", "all", "--warnings", "off", "--generation-database", "none",
        "--report", "ndjson", "--report-ndjson-path", str(report),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    print(done.stdout[-20_000:], done.stderr[-4_000:])
    assert done.returncode == 0
    assert httpx.get(f"{running.url}/health").status_code == 200
    found = summary(report)
    # Where the document itself comes from is not asked again.
    asked = {f"{method.upper()} {path}" for method, path in OPERATIONS if path != PATH}
    assert set(found["operations"]) == asked
    if EXAMPLES >= WHOLE:
        RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def summary(report: Path) -> dict[str, Any]:
    """Of each operation, how many requests there were and how they were answered."""
    statuses: dict[str, Counter[str]] = {}
    for line in report.read_text(encoding="utf-8").splitlines():
        recorder = (json.loads(line).get("ScenarioFinished") or {}).get("recorder", {})
        for interaction in recorder.get("interactions", {}).values():
            response = interaction["response"]
            status = "none" if response is None else str(response["status_code"])
            statuses.setdefault(recorder["label"], Counter())[status] += 1
    return {
        "examples": EXAMPLES,
        "checks": CHECKS,
        "requests": sum(counter.total() for counter in statuses.values()),
        "operations": {
            label: {"requests": counter.total(), "statuses": dict(sorted(counter.items()))}
            for label, counter in sorted(statuses.items())
        },
    }
