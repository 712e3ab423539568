"""Greedy answers on a checkpoint in bfloat16, against the same numbers held in float32.

    python benchmarks/peers/run.py answers [--prompts N] [--tokens N]

Both are loramux with the experts of the pool that ships; `auto` routes. Sixteen prompts are asked at a time.
bfloat16 is widened exactly, so answers differ only where the order of a sum decides between two tokens.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

import httpx

from benchmarks.prompts import stream

from .engines import PeerFailedError
from .files import DEFAULT_CACHE
from .gguf_engines import LoramuxGguf
from .gguf_files import make_gguf_files

AT_ONCE = 16


async def answers(engine: LoramuxGguf, prompts: list[str], tokens: int) -> list[str]:
    """Of a server that is started for them."""
    turns = asyncio.Semaphore(AT_ONCE)

    async def ask(client: httpx.AsyncClient, prompt: str) -> str:
        body = {
            "model": "auto", "messages": [{"role": "user", "content": prompt}], "temperature": 0,
            "max_tokens": tokens,
        }  # fmt: skip
        async with turns:
            response = await client.post("/v1/chat/completions", json=body)
        if response.status_code != 200:
            raise PeerFailedError(f"{engine.label}: {response.status_code}: {response.text[:300]}")
        return str(response.json()["choices"][0]["message"]["content"])

    try:
        await engine.start()
        async with httpx.AsyncClient(base_url=engine.url, trust_env=False, timeout=600) as client:
            return list(await asyncio.gather(*(ask(client, prompt) for prompt in prompts)))
    finally:
        engine.stop()


def main(given: list[str]) -> None:
    """The command; it fails where fewer than 95 of 100 are equal."""
    parser = argparse.ArgumentParser(
        description=__doc__, prog="run.py answers", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="model files, logs")
    arguments = parser.parse_args(given)
    files = make_gguf_files(arguments.cache, None)
    prompts = stream(arguments.prompts)
    found = [
        asyncio.run(answers(LoramuxGguf(files, arguments.cache, dtype), prompts, arguments.tokens))
        for dtype in ("bfloat16", "bfloat16 widened")
    ]
    equal = sum(one == other for one, other in zip(*found, strict=True))
    for prompt, one, other in zip(prompts, *found, strict=True):
        if one != other:
            print(f"{prompt!r}\n  bfloat16: {one!r}\n  float32:  {other!r}")
    print(f"{equal} of {len(prompts)} answers are equal")
    if equal < 0.95 * len(prompts):
        raise SystemExit(1)
