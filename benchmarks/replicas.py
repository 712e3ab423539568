"""`python benchmarks/replicas.py`: replicas killed under load, an edge before one, and where blends go.

`--only kills edge placement`, `--kills 20`, `--replicas 3`, `--output FILE`; `--ray`: engines of Ray. Every
server is the real command, or the parts that it has, in processes of its own.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[1]
POOL = ROOT / "tests" / "demo_pool"
BASE = "loramux-demo-base"
COMMAND = str(Path(sys.executable).parent / "loramux")
ADMIN = {"authorization": "Bearer admin"}
PROMPTS = (
    "How many wins does the team have when the venue is",
    "Find all files that were changed in the last two days",
    "The court held that the defendant shall",
    "The patient has had these symptoms since",
)
SCHEMA = {
    "type": "object",
    "properties": {"words": {"type": "array", "items": {"type": "string", "maxLength": 9}, "minItems": 9}},
    "required": ["words"],
    "additionalProperties": False,
}
MIXTURE = [{"id": "total-per", "scale": 0.6}, {"id": "movie-song", "scale": 0.5}]
KINDS: tuple[dict[str, Any], ...] = (
    {"model": BASE},
    {"model": "auto"},
    {"model": "auto", "lora": MIXTURE},
    {"model": "auto", "routing": {"merge": "svd"}, "logprobs": 1},
    {"model": "auto", "lora": MIXTURE, "presence_penalty": 0.8, "repetition_penalty": 1.1},
    {"model": "demo-loracoe"},
    {"model": "demo-mixlora"},
    {"model": "auto", "routing": {"strategy": "arrow", "top_m": 2}},
    {"model": "auto", "guided_json": SCHEMA},
)


#: So that a sequence has the same tokens wherever, and beside whatever, it is computed.
EXACT = ("engine.batch_invariant=true",)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def replicated(count: int, *, ray: bool) -> tuple[str, ...]:
    """The command with so many replicas: its own, or engines of Ray."""
    return ("deploy", "ray", "--replicas", str(count)) if ray else ("serve", "--replicas", str(count))


@asynccontextmanager
async def served(*words: str, more: Sequence[str] = ()) -> AsyncIterator[httpx.AsyncClient]:
    """`loramux serve`, or the command that is given, on a free port; with `more` settings."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [COMMAND, *(words or ("serve",)), "--port", str(port), "--pool", str(POOL)]
    for setting in ("device=cpu", "dtype=float32", "log_level=error", "admin_key=admin", *more):
        command += ["--set", setting]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)  # noqa: S603
        assert process.stdout is not None
        try:
            url = None
            while line := await asyncio.to_thread(process.stdout.readline):
                if found := re.search(r"ready at (http://\S+)", line):
                    url = found.group(1)
                    break
            if url is None:
                log.seek(0)
                raise SystemExit(f"the server did not start: {log.read()[-2000:]}")
            limits = httpx.Limits(max_connections=200)
            async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
                yield client
        finally:
            process.terminate()
            process.wait(300)
            process.stdout.close()


@dataclass
class Stream:
    """What came of one request. `error` is what went wrong, if anything did."""

    text: str = ""
    tokens: int = 0
    first: float = 0.0
    pause: float = 0.0
    error: str | None = None
    logprobs: list[float] = field(default_factory=list)


async def stream(client: httpx.AsyncClient, body: Mapping[str, Any], progress: Callable[[], None]) -> Stream:
    found = Stream()
    began = last = time.perf_counter()
    try:
        async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            if answer.status_code != 200:
                found.error = (await answer.aread()).decode()
                return found
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    found.error = str(event["error"])
                    return found
                now = time.perf_counter()
                text = "".join(choice["text"] for choice in event["choices"])
                for choice in event["choices"]:
                    found.logprobs += (choice.get("logprobs") or {}).get("token_logprobs", [])
                if text and not found.tokens:
                    found.first = now - began
                elif text:
                    found.pause = max(found.pause, now - last)
                last = now
                found.tokens += bool(text)
                found.text += text
                progress()
    except httpx.HTTPError as error:
        found.error = f"{type(error).__name__}: {error}"
    return found


def requests(count: int, tokens: int, seed: int = 0) -> list[dict[str, Any]]:
    """Of every kind, greedy and seeded in turns, each with its own prompt."""
    chooser = random.Random(seed)
    found = []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        drawn = {"temperature": 1.0, "seed": number} if number // len(KINDS) % 2 else {"temperature": 0}
        prompt = f"{chooser.choice(PROMPTS)} {chooser.randrange(1000)}"
        found.append({"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, **kind, **drawn})
    return found


async def all_of(
    client: httpx.AsyncClient,
    bodies: Sequence[Mapping[str, Any]],
    progress: Callable[[], None] = lambda: None,
) -> list[Stream]:
    return list(await asyncio.gather(*(stream(client, body, progress) for body in bodies)))


async def replicas(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    answer = await client.get("/v1/replicas", headers=ADMIN)
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


async def kills(count: int, streams: int, tokens: int, among: int, *, ray: bool) -> dict[str, Any]:
    """One replica after another is killed while all streams run; what they say against one undisturbed
    server."""
    from benchmarks.latency import percentile

    bodies = [{**body, "logprobs": 1} for body in requests(streams, tokens)]
    async with served(more=EXACT) as plain:
        expected = await all_of(plain, bodies)
        again = await all_of(plain, bodies)
    assert not any(one.error for one in expected), [one.error for one in expected if one.error]
    unsteady = sum(a.text != b.text for a, b in zip(expected, again, strict=True))
    chooser = random.Random(0)
    lost = different = inexact = moved = 0
    pauses: list[float] = []
    restarts: list[float] = []
    async with served(*replicated(among, ray=ray), more=EXACT) as edge:
        quiet = await all_of(edge, bodies)
        apart = sum(a.text != b.text for a, b in zip(quiet, expected, strict=True))
        total = sum(one.tokens for one in quiet)
        for number in range(count):
            before = await replicas(edge)
            events, when = 0, chooser.uniform(0.05, 0.8) * total
            due = asyncio.Event()

            def progress(when: float = when, due: asyncio.Event = due) -> None:
                nonlocal events
                events += 1
                if events >= when:
                    due.set()

            running = asyncio.create_task(all_of(edge, bodies, progress))
            await due.wait()
            victim = chooser.choice([one for one in await replicas(edge) if one["sequences"]] or before)
            os.kill(victim["pid"], signal.SIGKILL)
            killed = time.perf_counter()
            answers = await running
            while not all(one["up"] for one in await replicas(edge)):
                await asyncio.sleep(0.05)
            restarts.append(time.perf_counter() - killed)
            after = await replicas(edge)
            moved += sum(one["moved_sequences"] for one in after) - sum(
                one["moved_sequences"] for one in before
            )
            lost += sum(one.error is not None for one in answers)
            wrong = [i for i, (a, b) in enumerate(zip(answers, expected, strict=True)) if a.text != b.text]
            different += len(wrong)
            inexact += sum(a.logprobs != b.logprobs for a, b in zip(answers, expected, strict=True))
            pauses += [one.pause for one in answers]
            say(
                f"kill {number + 1} of {count}: replica {victim['replica']} with "
                f"{victim['sequences']} sequences, lost {lost}, "
                f"different {different}, in the last bits {inexact}"
                + "".join(f"\n  {bodies[i]}: {answers[i].error or ''}" for i in wrong)
            )
    return {
        "kills": count,
        "streams": streams,
        "tokens": tokens,
        "replicas": among,
        "requests": count * streams,
        "lost": lost,
        "different": different,
        "different_log_probabilities": inexact,
        "moved": moved,
        "different_between_two_undisturbed_runs": unsteady,
        "different_without_a_kill": apart,
        "longest_pause_s": {"p50": percentile(pauses, 50), "p99": percentile(pauses, 99), "max": max(pauses)},
        "back_after_s": {"median": statistics.median(restarts), "max": max(restarts)},
    }


async def edge(repeats: int, streams: int, tokens: int, *, ray: bool) -> dict[str, Any]:
    """Tokens a second of the plain server and of an edge before one replica, in turns."""
    bodies = [{**body, "stream": True} for body in requests(streams, tokens)]
    rates: dict[str, list[float]] = {"plain": [], "edge": []}
    firsts: dict[str, list[float]] = {"plain": [], "edge": []}
    async with served() as plain, served(*replicated(1, ray=ray)) as behind:
        clients = {"plain": plain, "edge": behind}
        for client in clients.values():
            await all_of(client, bodies)
        for repeat in range(repeats):
            for name in list(clients)[:: -1 if repeat % 2 else 1]:
                began = time.perf_counter()
                answers = await all_of(clients[name], bodies)
                seconds = time.perf_counter() - began
                assert not any(one.error for one in answers)
                rates[name].append(sum(one.tokens for one in answers) / seconds)
                firsts[name].append(statistics.median(one.first for one in answers))
                say(f"edge, {repeat + 1} of {repeats}: {name} {rates[name][-1]:.0f} tokens/s")
    ratios = [a / b for a, b in zip(rates["edge"], rates["plain"], strict=True)]
    return {
        "streams": streams,
        "tokens_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "first_token_ms": {name: 1e3 * statistics.median(values) for name, values in firsts.items()},
        "ratio": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
        "goal": 0.95,
    }


async def main(arguments: argparse.Namespace) -> None:
    from benchmarks.machine import facts, versions

    found: dict[str, Any] = {"machine": facts(), "versions": versions()}
    if arguments.ray:
        found["versions"]["ray"] = version("ray")
    if "kills" in arguments.only:
        found["kills"] = await kills(
            arguments.kills, arguments.streams, arguments.tokens, arguments.replicas, ray=arguments.ray
        )
    if "edge" in arguments.only:
        found["edge"] = await edge(arguments.repeats, 16, 96, ray=arguments.ray)
    if "placement" in arguments.only and not arguments.ray:
        from benchmarks.placement import placement

        found["placement"] = await placement(
            arguments.requests, 200, 48, 20, 3, 12, 16, turns=arguments.turns
        )
    text = json.dumps(found, indent=1)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n")
    print(text)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=("kills", "edge", "placement"),
                        default=("kills", "edge", "placement"))  # fmt: skip
    parser.add_argument("--ray", action="store_true", help="engines of `loramux deploy ray` (loramux[ray])")
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--streams", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.path[0] = str(ROOT / "benchmarks")
    from run import add_package

    for package in ("benchmarks", "tests"):
        add_package(package)
    sys.path.pop(0)
    asyncio.run(main(parsed()))
