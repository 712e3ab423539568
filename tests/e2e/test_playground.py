"""The page in a real browser, on the demo pool: what a user does with it, by `playground.cjs`.

Needs node, Debian's chromium and playwright-core (`make browser` installs the last into `build/browser`).
PLAYGROUND_PICTURES=docs/images takes the pictures of the docs anew.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from loramux.server.settings import DEFAULT_POOL
from tests.e2e.conftest import Server
from tests.e2e.conftest import serving as command
from tests.http.serving import serving

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("playground.cjs")
CHECKS = re.findall(r'^  async "([^"]+)"\(\)', SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
MODULES = os.pathsep.join(
    part for part in (str(ROOT / "build" / "browser" / "node_modules"), os.environ.get("NODE_PATH")) if part
)
NODE = shutil.which("node")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def missing() -> str | None:
    """What is not installed."""
    if NODE is None:
        return "node is not installed"
    if BROWSER is None:
        return "chromium is not installed"
    found = subprocess.run(
        [NODE, "-e", "require.resolve('playwright-core')"],
        env={**os.environ, "NODE_PATH": MODULES},
        capture_output=True,
        check=False,
    )
    return "playwright-core is not installed; `make browser` does it" if found.returncode else None


REASON = missing()
pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(900),
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every check's outcome; the browser is started once for all."""
    server: Server = request.getfixturevalue("server")
    pictures = os.environ.get("PLAYGROUND_PICTURES")
    with ExitStack() as stack:
        keyed = stack.enter_context(serving(tmp_path_factory.mktemp("pool"), keys=("right-key",)))
        # Pictures show what a stranger sees: the pool that ships.
        shown = (
            [pictures, stack.enter_context(command("--pool", str(DEFAULT_POOL))).url + "/"]
            if pictures
            else []
        )
        done = subprocess.run(
            [
                str(NODE), str(SCRIPT), f"{server.url}/", f"{keyed.url}/", str(BROWSER),
                *shown,
            ],
            env={**os.environ, "NODE_PATH": MODULES},
            capture_output=True,
            text=True,
            timeout=800,
            check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, done.stdout.splitlines())
    return {line["name"]: line for line in lines}


@pytest.mark.parametrize("check", CHECKS)
def test_in_the_browser(results: dict[str, Any], check: str) -> None:
    assert results[check]["problem"] is None, results[check]["problem"]


def test_the_shown_commands_give_the_answer(results: dict[str, Any]) -> None:
    found = results["what was sent comes as curl and as Python"]["found"]
    assert found["answer"].strip()
    python = subprocess.run(
        [sys.executable, "-c", found["python"]], capture_output=True, text=True, timeout=60, check=True
    )
    assert python.stdout == found["answer"] + "\n"
    if shell := shutil.which("curl") and shutil.which("sh"):
        curl = subprocess.run(
            [shell, "-c", found["curl"]], capture_output=True, text=True, timeout=60, check=True
        )
        events = [json.loads(line[6:]) for line in curl.stdout.splitlines() if line.startswith("data: {")]
        text = "".join(
            choice["delta"].get("content") or "" for event in events for choice in event["choices"]
        )
        assert text == found["answer"]


def test_every_check_is_found_here() -> None:
    assert len(CHECKS) >= 19
