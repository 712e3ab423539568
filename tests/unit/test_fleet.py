"""The simulation of a fleet: against closed forms, against a loop of single steps, and against the placement
that is served."""

import hashlib
import importlib
import runpy
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
runpy.run_path(str(ROOT / "benchmarks" / "run.py"))["add_package"]("benchmarks")
measured, placing, replicas, simulating, traffics = (
    importlib.import_module(f"benchmarks.fleet.{name}")
    for name in ("measured", "placement", "replica", "simulate", "traffic")
)


def steps(**options: Any) -> Any:
    given: dict[str, Any] = {
        "decode": (0.0, 0.010, 0.012, 0.014, 0.016),
        "prefill": 0.02,
        "prefill_token": 1e-4,
        "step_tokens": 64,
        "expert_bytes": 1e6,
        "copy_rate": 1e9,
    }
    return measured.Steps(**{**given, **options})


def some_traffic(seed: int, rate: float = 30.0, seconds: float = 20.0, **options: Any) -> Any:
    demand = traffics.Demand(blends=200, experts=60, domain=6, prompt=20.0, answer=8.0)
    return traffics.make(replace(demand, **options), rate, seconds, seed)


def run(
    traffic: Any, count: int, name: str = "affinity", room: int = 12, loss: Any = None, **options: Any
) -> Any:
    fleet = simulating.Fleet(count, room, steps(**options))
    return simulating.Simulation(fleet, traffic, placing.Placement(name, 0), loss).run()


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_a_queue_of_equal_services_waits_as_long_as_the_formula_says(load: float) -> None:
    """M/D/1: one sequence at a time, answers of one token, experts always resident; the mean wait is
    ρ s / 2(1 - ρ) (Pollaczek and Khinchine)."""
    service = 0.02
    traffic = some_traffic(3, load / service, 500.0, answer=1.0, prompt=1.0)
    outcome = run(traffic, 1, room=60, decode=(0.0, 0.01), prefill=service, prefill_token=0.0, copy_rate=1e15)
    waits = outcome.first - service
    exact = [0.0]  # Lindley's recursion, of these very arrivals
    for gap in np.diff(traffic.at):
        exact.append(max(0.0, exact[-1] + service - gap))
    np.testing.assert_allclose(waits, exact, atol=1e-6)
    assert waits.mean() == pytest.approx(load * service / (2 * (1 - load)), rel=0.15)


def test_experts_are_found_resident_as_often_as_che_says() -> None:
    """LRU under independent requests: expert i is found with probability 1 - exp(-p_i t), where t makes the
    expected number of residents the room (Che, Tung and Wang 2002, "Hierarchical Web Caching Systems")."""
    experts, room, exponent = 400, 50, 0.9
    traffic = some_traffic(
        4, 50.0, 200.0, experts=experts, parts=1, blends=200_000, exponent=0.0, expert_exponent=exponent,
        turns=1.0, same=0.0, answer=1.0, prompt=1.0,
    )  # fmt: skip
    outcome = run(traffic, 1, room=room, decode=(0.0, 1e-4), prefill=1e-4, prefill_token=0.0, copy_rate=1e15)
    shares = np.bincount(traffic.experts[:, 0], minlength=experts) / len(traffic)
    low, high = 0.0, 1e6
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - np.exp(-shares * middle)).sum() < room else (low, middle)
    expected = float((shares * (1 - np.exp(-shares * low))).sum())
    late = traffic.at > 60
    assert 1 - outcome.copied[late].mean() == pytest.approx(expected, abs=0.015)


@dataclass
class Plain:
    """A replica that takes every single step, as plainly as it can be written."""

    steps: Any

    def first_tokens(self, arrivals: list[tuple[float, int, int]]) -> list[float]:
        clock, coming = 0.0, deque((at, number) for number, (at, _, _) in enumerate(arrivals))
        waiting: deque[int] = deque()
        left: dict[int, int] = {}
        first = [0.0] * len(arrivals)
        while coming or waiting or left:
            if not waiting and not left:
                clock = max(clock, coming[0][0])
            while coming and coming[0][0] <= clock + 1e-12:
                waiting.append(coming.popleft()[1])
            fresh: list[int] = []
            while waiting and len(left) + len(fresh) < self.steps.max_running:
                if fresh and sum(arrivals[n][1] for n in [*fresh, waiting[0]]) > self.steps.step_tokens:
                    break
                fresh.append(waiting.popleft())
            took = self.steps.decode[len(left)]
            if fresh:
                tokens = sum(arrivals[n][1] for n in fresh)
                took = max(self.steps.prefill, took) + self.steps.prefill_token * tokens
            clock += took
            # A step with prompts in it gives no other tokens: the engine cuts prompts so that it may, which
            # is not modelled.
            if not fresh:
                left = {n: rest - 1 for n, rest in left.items() if rest > 1}
            else:
                left = {n: rest - 1 for n, rest in left.items() if rest > 1}
                left |= {n: arrivals[n][2] - 1 for n in fresh if arrivals[n][2] > 1}
            for number in fresh:
                first[number] = clock - arrivals[number][0]
        return first


@pytest.mark.parametrize("rate", [5.0, 40.0, 90.0])
def test_stretches_of_steps_are_the_steps_one_by_one(rate: float) -> None:
    traffic = some_traffic(5, rate, 20.0)
    outcome = run(traffic, 1, room=60, copy_rate=1e15)
    arrivals = list(zip(traffic.at.tolist(), traffic.prompt.tolist(), traffic.answer.tolist(), strict=True))
    plain = Plain(steps()).first_tokens(arrivals)
    np.testing.assert_allclose(outcome.first, plain, atol=1e-5)


def test_sequences_that_come_at_the_same_moment_were_once_divided_by_nothing() -> None:
    replica = replicas.Replica(steps(), 4)
    for number in range(3):
        replica.put(replicas.Sequence(number, 10, 3), 1.0)
    assert replica.wake == 1.0
    assert replica.step() == ([], [])
    assert [one.request for one in replica.step()[0]] == [0, 1, 2]


@pytest.mark.parametrize("name", placing.PLACEMENTS)
def test_a_seed_gives_the_same_numbers_and_every_request_an_answer(name: str) -> None:
    once, again = (run(some_traffic(6), 4, name) for _ in range(2))
    np.testing.assert_array_equal(once.first, again.first)
    np.testing.assert_array_equal(once.copied, again.copied)
    assert not np.isnan(once.first).any()
    assert once.tokens.sum() == some_traffic(6).answer.sum()


def test_a_lost_replica_loses_no_request_and_no_token() -> None:
    traffic = some_traffic(7, 45.0)
    outcome = run(traffic, 3, loss=simulating.Loss(10.0, 1))
    assert outcome.moved
    assert not np.isnan(outcome.first).any()
    assert min(outcome.moved.values()) >= simulating.NOTICE
    assert outcome.tokens.sum() == traffic.answer.sum()
    untouched = run(traffic, 3)
    early = traffic.at < 9
    np.testing.assert_array_equal(outcome.first[early], untouched.first[early])


def test_a_blend_is_of_the_same_different_experts_whenever_it_comes() -> None:
    traffic = some_traffic(8)
    by_blend: dict[int, tuple[int, ...]] = {}
    for blend, experts in zip(traffic.blend.tolist(), traffic.experts.tolist(), strict=True):
        assert by_blend.setdefault(blend, tuple(experts)) == tuple(experts)
        assert len(set(experts)) == 3
        assert max(experts) < 60
    assert len(set(by_blend.values())) > 20


def test_affinity_copies_less_and_no_replica_exceeds_the_bound() -> None:
    traffic = some_traffic(9, 60.0)
    copied = {name: int(run(traffic, 4, name).copied.sum()) for name in ("random", "affinity")}
    assert copied["affinity"] < copied["random"] / 1.5
    chooser, generator = placing.Placement("affinity", 0), np.random.default_rng(1)
    for _ in range(200):
        loads, missing = generator.integers(0, 9, 7), generator.integers(0, 4, 7)
        chosen = chooser.choose(np.arange(7), loads, missing, int(generator.integers(1 << 40)), 0)
        mean = (loads.sum() + 1) / 7
        assert loads[chosen] + 1 <= max(placing.BOUND * mean, mean + placing.FEW)


def test_what_is_simulated_is_what_is_served() -> None:
    served = pytest.importorskip("loramux.server.replicas.placement", exc_type=ImportError)

    @dataclass(frozen=True)
    class Place:
        number: int
        load: int
        shadow: Any

    def turn(key: int, numbers: Any) -> Any:
        digests = (hashlib.sha256(f"{key} {number}".encode()).digest() for number in numbers.tolist())
        return np.array([int.from_bytes(digest[:8], "big") for digest in digests], np.uint64)

    assert served.BOUND == placing.BOUND
    generator = np.random.default_rng(2)
    chooser = placing.Placement("affinity", 0, turn)
    for _ in range(300):
        count = int(generator.integers(1, 9))
        parts = tuple((f"expert {n}", 1) for n in range(3))
        held = [[part for part in parts if generator.random() < 0.4] for _ in range(count)]
        loads = generator.integers(0, 6, count)
        key = int(generator.integers(1 << 40))
        places = [Place(n, int(loads[n]), served.Shadow(64, resident=held[n])) for n in range(count)]
        expected = served.Affinity().order(places, served.Wish(str(key), parts))[0].number
        missing = np.array([3 - len(one) for one in held])
        assert chooser.choose(np.arange(count), loads, missing, key, 0) == expected


def test_the_measured_figures_are_read_and_rise_with_the_batch() -> None:
    for name in ("h200-1b", "cpu-0.39b"):
        one = measured.read(name)
        assert one.max_running == 32
        assert list(one.decode) == sorted(one.decode)
        assert one.capacity(256, 128) > one.capacity(256, 256) > 0


def test_the_command_says_everything_and_draws_it() -> None:
    simulation = importlib.import_module("benchmarks.simulation")
    drawing = importlib.import_module("benchmarks.fleet.drawing")
    found = simulation.run("cpu-0.39b", 2, 32, 0.5, 45.0, 1)
    assert set(found["placements"]) == set(placing.PLACEMENTS)
    for one in found["placements"].values():
        assert one["unanswered"] == 0
        assert 0 <= one["experts_resident"] <= 1
    assert len(found["loss"]["affinity"]["seconds"]) == 12
    assert drawing.fleet([found]).count("<rect") == 1 + 4 * len(placing.PLACEMENTS)
