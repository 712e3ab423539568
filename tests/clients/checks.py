"""What the scripts of this folder share: a line a check, and an exit status that says whether all held.

Each script runs in an environment of its own that has one client and nothing of this project.
"""

import os
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version

URL = os.environ["LORAMUX_URL"]
API = f"{URL}/v1"
ASK = "How many points did Ferrari score in the 1998 season?"
TOO_LONG = "word " * 6000

_failed: list[str] = []


def started(*packages: str) -> None:
    """Name what is tried."""
    print("version", ", ".join(f"{name} {version(name)}" for name in packages), flush=True)


def check(work: Callable[[], str | None]) -> None:
    """Run a check, as a decorator; its name is the function's. What it returns is printed beside the name."""
    name = work.__name__.replace("_", " ")
    try:
        found = work()
    except Exception:
        _failed.append(name)
        print("FAILED", name, flush=True)
        traceback.print_exc()
    else:
        print("ok", name if found is None else f"{name}: {found}", flush=True)


def finished() -> None:
    """End the process: 0 when every check held."""
    sys.exit(len(_failed))
