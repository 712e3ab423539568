"""Starting: in 4 bits, with a damaged pool, and the way out."""

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import COMMAND, serving
from tests.kit import DEMO_POOL

QUESTION = [{"role": "user", "content": "What is the total number of points when the driver is Senna?"}]


def test_a_4_bit_base_answers_on_a_cpu() -> None:
    with serving("--quantization", "nf4", "--device", "cpu") as server:
        answer = server.post(
            "/v1/chat/completions", model="auto", messages=QUESTION, max_tokens=16, temperature=0
        )
        assert answer["choices"][0]["message"]["content"].strip()
        assert answer["loramux"]["route"]["experts"]


def test_sigterm_ends_the_process_cleanly() -> None:
    with serving() as server:
        assert httpx.get(f"{server.url}/ready").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0


# The command, with a device that is lost once the server is ready.
LOST_DEVICE = """
from loramux.server.cli import main
from loramux.server.engine.local import LocalEngine
from loramux.server.engine.scheduler import Scheduler

def lost(scheduler):
    raise RuntimeError("the device is gone")

async def start(engine, start=LocalEngine.start):
    await start(engine)
    Scheduler.next = lost

LocalEngine.start = start
main()
"""


def test_an_engine_that_dies_ends_the_process_with_an_error() -> None:
    """So that a supervisor starts it again: a health check alone would leave it running for nobody."""
    with serving(command=[sys.executable, "-c", LOST_DEVICE]) as server:
        asked = {"model": "auto", "messages": QUESTION, "max_tokens": 4}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=asked, timeout=60)
        assert answer.status_code in (500, 503)
        assert server.process.wait(60) == 1
        assert server.process.stderr is not None
        said = server.process.stderr.read().strip().splitlines()
        assert "stopped, because the engine died: the device is gone" in said[-1]


def damaged(pool: Path, name: str, how: str) -> None:
    file = next(iter(sorted(pool.rglob(name))))
    content = bytearray(file.read_bytes())
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        content[-5] ^= 0xFF
        file.write_bytes(content)
    else:
        file.unlink()


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("adapter_model.safetensors", "flipped"),
        ("router.safetensors", "truncated"),
        ("model.safetensors", "missing"),
        ("router.json", "truncated"),
    ],
)
def test_a_damaged_pool_stops_the_start_with_one_line(
    tmp_path: Path, pool_dir: Path, name: str, how: str
) -> None:
    pool = tmp_path / "pool"
    shutil.copytree(pool_dir, pool)
    damaged(pool, name, how)
    done = subprocess.run(
        [*COMMAND, "serve", "--port", "0", "--pool", str(pool)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert name in done.stderr


def test_a_cache_that_cannot_fit_stops_the_start_with_the_numbers_before_anything_is_loaded() -> None:
    done = subprocess.run(
        [*COMMAND, "serve", "--port", "0", "--pool", str(DEMO_POOL), "--set", "engine.kv_tokens=9000000000"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert re.search(
        r"GiB of memory are needed, [\d.]+ \w+ are free .*kv .*engine\.kv_tokens at most \d+", done.stderr
    )
