"""Commands that need no model do not import what runs one."""

import subprocess
import sys

import pytest

from tests.kit import DEMO_POOL

HEAVY = ("torch", "transformers", "peft", "sentence_transformers")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["version"],
        ["config"],
        # An encoder that is a transformer needs torch; a static one does not.
        ["route", "--pool", str(DEMO_POOL), "find all txt files"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_it_once_imported_the_engine(arguments: list[str]) -> None:
    script = f"""
import sys
from loramux.server.cli import app
sys.argv = ["loramux", *{arguments!r}]
try:
    app(prog_name="loramux")
except SystemExit as end:
    assert not end.code, end.code
assert not [name for name in {HEAVY!r} if name in sys.modules], sorted(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
