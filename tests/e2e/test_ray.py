"""Under a real Ray: an engine is killed under running streams, and a config file of Ray Serve is deployed."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.kit import DEMO_POOL

pytest.importorskip("ray", reason="loramux[ray] is not installed")

ROOT = Path(__file__).parents[2]
SECONDS = 240


@pytest.mark.timeout(2 * SECONDS)
def test_an_engine_that_is_killed_loses_no_request_and_changes_no_token(tmp_path: Path) -> None:
    file = tmp_path / "kills.json"
    command = [
        sys.executable,
        ROOT / "benchmarks" / "replicas.py",
        "--ray",
        "--only",
        "kills",
        "--kills",
        "1",
    ]
    sizes = ["--replicas", "2", "--streams", "18", "--tokens", "64", "--output", file]
    subprocess.run([*command, *sizes], check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(file.read_text())["kills"]
    assert (found["requests"], found["lost"], found["different"]) == (18, 0, 0)
    assert found["different_without_a_kill"] == 0
    assert found["moved"] > 0


@pytest.mark.timeout(2 * SECONDS)
def test_ray_serve_runs_the_config_file(tmp_path: Path) -> None:
    """docker/ray/serve.yaml with two engines on the CPU."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = yaml.safe_load((ROOT / "docker" / "ray" / "serve.yaml").read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    settings = {"pool": str(DEMO_POOL), "device": "cpu", "replicas": 2, "api_keys": ["key"]}
    args = config["applications"][0]["args"]
    args |= {"cpus": 0.4, "gpus": 0, "per_machine": 2, "settings": args["settings"] | settings}
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    with (tmp_path / "log").open("w+") as log:
        command = [Path(sys.executable).parent / "serve", "run", file]
        serving = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                limit = time.monotonic() + SECONDS
                while True:
                    try:
                        if client.get("/ready").status_code == 200:
                            break
                    except httpx.HTTPError:
                        pass
                    log.seek(0)
                    assert serving.poll() is None, log.read()
                    assert time.monotonic() < limit, log.read()
                    time.sleep(0.5)
                body = {"model": "auto", "prompt": "How many wins", "max_tokens": 4}
                assert client.post("/v1/completions", json=body).status_code == 401
                known = {"authorization": "Bearer key"}
                answer = client.post("/v1/completions", json=body, headers=known)
                assert answer.status_code == 200, answer.text
                assert answer.json()["usage"]["completion_tokens"] > 0
        finally:
            serving.terminate()
            serving.wait(60)
