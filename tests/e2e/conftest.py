"""The real command, on the pool that ships, in a process of its own."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.kit import DEMO_POOL

COMMAND = [str(Path(sys.executable).parent / "loramux")]


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    process: subprocess.Popen[str]

    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def post(self, path: str, **body: Any) -> Any:
        response = httpx.post(f"{self.url}{path}", json=body, timeout=120)
        response.raise_for_status()
        return response.json()


@contextmanager
def serving(*arguments: str, command: Sequence[str] = COMMAND) -> Iterator[Server]:
    """`loramux serve`, or another command like it, on a free port until the context ends; on the demo pool,
    if no other is named."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    pool = [] if "--pool" in arguments else ["--pool", str(DEMO_POOL)]
    process = subprocess.Popen(
        [*command, "serve", "--port", "0", *pool, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        for line in process.stdout:
            found = re.search(r"ready at (http://\S+)", line)
            if found:
                yield Server(found.group(1), process)
                return
        raise AssertionError(f"the server did not start: {process.stderr.read()}")
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()
        process.stderr.close()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture(scope="session")
def pool_dir() -> Path:
    return DEMO_POOL
