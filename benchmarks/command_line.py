"""Seconds from a command to its end: wall clock and processor time, the least of several runs.

.venv/bin/python benchmarks/command_line.py [--runs 5] [--out command_line.json]
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = {
    "--version": ["--version"],
    "--help": ["--help"],
    "a mistake": ["nonsense"],
    "config": ["config"],
    "pool list": ["pool", "list"],
    "pool show": ["pool", "show"],
    "pool check --files": ["pool", "check", "--files"],
    "route, static encoder": ["route", "--pool", "tests/demo_pool", "find all txt files"],
    "route, transformer encoder": ["route", "find all txt files"],
    "pool check": ["pool", "check"],
    "doctor": ["doctor", "--set", "port=0"],
}


def timed(arguments: list[str]) -> tuple[float, float]:
    """(wall, processor) seconds of one run."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    command = [sys.executable, "-c", "from loramux.server.cli import main; main()", *arguments]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)  # noqa: S603
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Time every command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.chdir(Path(__file__).parents[1])
    found = {}
    for name, arguments in COMMANDS.items():
        runs = [timed(arguments) for _ in range(options.runs)]
        wall, processor = (min(column) for column in zip(*runs, strict=True))
        found[name] = {"wall": round(wall, 3), "processor": round(processor, 3)}
        print(f"{name:<28} {wall:6.2f} s   {processor:6.2f} s of processor", flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
