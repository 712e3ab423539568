"""LoRA, LoRAMoE and LoRACoE with 16 ranks each on the same rows, and which of them matter for which task.

    .venv/bin/python benchmarks/importance.py --data CORPUS [--steps 400] [--limit 40] [--work DIRECTORY]

Trains on the `*.train.jsonl` and measures on the `*.test.jsonl` of the folder; a killed run goes on. Writes
benchmarks/results/importance.json, and the page beside the trained models.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
POOL = ROOT / "tests" / "demo_pool"
#: 16 ranks at a module each, scale 2.
METHODS = {
    "lora": ["--rank", "16", "--alpha", "32"],
    "loramoe": ["--rank", "4", "--alpha", "8", "--experts", "4"],
    "loracoe": ["--rank", "16", "--alpha", "32", "--experts", "2"],
}


def loramux(*arguments: str) -> None:
    """Run a command of the package."""
    command = [sys.executable, "-c", "from loramux.server.cli import main; main()", *arguments]
    subprocess.run(command, check=True, cwd=ROOT)  # noqa: S603


def main() -> None:
    """Train, then measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "importance")
    options = parser.parse_args()
    data, work = options.data.resolve(), options.work.resolve()
    # LoRAMoE has experts in feed-forward blocks alone; so have the others here.
    targets = [word for name in ("gate_proj", "up_proj", "down_proj") for word in ("--target", name)]
    adapters: list[str] = []
    for method, shape in METHODS.items():
        out = work / method
        loramux(
            "train", method, "--data", str(data), "--base", str(POOL / "base"), "--base-id",
            "loramux-demo-base", "--out", str(out), "--steps", str(options.steps), "--max-tokens", "256",
            *targets, *shape,
        )  # fmt: skip
        adapters += ["--adapter", f"{method}={out}"]
    loramux(
        "analyze", "importance", "--pool", str(POOL), "--data", str(data), "--limit", str(options.limit),
        "--only", "demo-loracoe", *adapters, "--out", str(ROOT / "benchmarks/results/importance.json"),
        "--html", str(work / "importance.html"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
