"""`python benchmarks/simulation.py`: a fleet of replicas under each placement, and after a loss.

Prints one JSON object, or writes it with `--save`. The same seed gives the same numbers.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run(machine: str, replicas: int, room: int, load: float, seconds: float, seed: int) -> dict[str, Any]:
    """Every placement on the same traffic, and a loss under the two that look at loads."""
    from benchmarks.fleet import measured
    from benchmarks.fleet.placement import PLACEMENTS, Placement
    from benchmarks.fleet.simulate import Fleet, Loss, Simulation, pauses, second_by_second, summary
    from benchmarks.fleet.traffic import Demand, make

    steps = measured.read(machine)
    demand = Demand()
    if steps.prefill_token > 1e-3:  # a small machine gets short requests
        demand = replace(demand, prompt=32.0, answer=32.0)
    fleet = Fleet(replicas, room, steps)
    rate = load * replicas * steps.capacity(demand.prompt, demand.answer)
    traffic = make(demand, rate, seconds, seed)
    found: dict[str, Any] = {
        "machine": machine, "replicas": replicas, "room": room, "load": load, "seed": seed,
        "requests": len(traffic), "requests_per_second": round(rate, 2), "demand": asdict(demand),
        "placements": {}, "loss": {},
    }  # fmt: skip
    for name in PLACEMENTS:
        started = time.monotonic()
        outcome = Simulation(fleet, traffic, Placement(name, seed)).run()
        found["placements"][name] = summary(outcome, fleet, seconds / 3, demand.parts)
        _say(f"{machine}, {replicas} replicas, {name}: {time.monotonic() - started:.0f} s")
    for name in ("least-loaded", "affinity"):
        if replicas > 1:
            at = seconds * 2 / 3
            outcome = Simulation(fleet, traffic, Placement(name, seed), Loss(at)).run()
            found["loss"][name] = {
                **pauses(outcome), "seconds": second_by_second(outcome, at, 10, demand.parts)
            }  # fmt: skip
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="benchmarks/simulation.py", description=__doc__)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 3, 8, 32, 256])
    parser.add_argument("--machine", default="h200-1b", help="one of results/measured-steps.json")
    parser.add_argument("--room", type=int, default=64, help="experts resident at once at a replica")
    parser.add_argument("--load", type=float, default=0.6, help="of what the fleet could serve")
    parser.add_argument("--seconds", type=float, default=60, help="simulated; the first third warms up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--save", type=Path, metavar="FILE", help="write the JSON there, and a plot beside it"
    )
    given = parser.parse_args()
    runs = [
        run(given.machine, replicas, given.room, given.load, given.seconds, given.seed)
        for replicas in given.replicas
    ]
    text = json.dumps({"benchmark": "simulation of a fleet", "runs": runs}, indent=1)
    if given.save:
        from benchmarks.fleet import drawing

        given.save.write_text(text + "\n")
        given.save.with_suffix(".svg").write_text(drawing.fleet(runs))
    print(text)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    import runpy

    add_package = runpy.run_path(str(ROOT / "benchmarks" / "run.py"))["add_package"]
    add_package("benchmarks")
    main()
