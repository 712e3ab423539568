"""Concurrent streaming completions against any OpenAI-compatible server, with a clock."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

Mixture = tuple[tuple[str, float], ...]
TIMEOUT_S = 900.0


class AnswerError(RuntimeError):
    """A server did not answer as asked; the message has its own words."""


@dataclass(frozen=True)
class Answer:
    """One answer: its text, token counts by the server's own usage, and when its pieces came, in seconds."""

    text: str
    prompt_tokens: int
    tokens: int
    sent: float
    arrivals: list[float]


@dataclass
class Run:
    """One run of a scenario: answer tokens and seconds of it all, and the latencies of its requests."""

    tokens: int
    seconds: float
    first_token_s: list[float]
    gaps_s: list[float]
    texts: list[str] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def summary(self) -> dict[str, float]:
        """Tokens a second, and milliseconds: time to first token p50, inter-token p50 and p99."""
        gaps = sorted(self.gaps_s) or [float("nan")]
        return {
            "tokens_per_second": self.tokens_per_second,
            "first_token_p50_ms": 1e3 * statistics.median(self.first_token_s),
            "inter_token_p50_ms": 1e3 * statistics.median(gaps),
            "inter_token_p99_ms": 1e3 * gaps[min(len(gaps) - 1, round(0.99 * (len(gaps) - 1)))],
        }


async def _completion(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    sent = time.perf_counter()
    pieces: list[str] = []
    arrivals: list[float] = []
    usage: dict[str, int] = {}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            problem = (await response.aread()).decode(errors="replace")[:500]
            raise AnswerError(f"{response.request.url}: {response.status_code}: {problem}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[len("data: ") :])
            if "error" in event:
                raise AnswerError(f"{response.request.url}: {event['error']}")
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                if text := choice.get("text"):
                    pieces.append(text)
                    arrivals.append(time.perf_counter())
    if not usage:
        raise AnswerError(f"{body['model']}: the stream ended without usage")
    return Answer("".join(pieces), usage["prompt_tokens"], usage["completion_tokens"], sent, arrivals)


async def complete(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    """One streaming completion.

    Raises:
        AnswerError: no connection, an error status, an error in the stream, or a stream without usage.
    """
    try:
        return await _completion(client, body)
    except httpx.TransportError as error:
        raise AnswerError(f"{client.base_url}: {type(error).__name__} {error}") from None


async def drive(url: str, bodies: Sequence[dict[str, Any]], prompt_tokens: int) -> Run:
    """All requests at once; every one must have exactly the tokens it was asked for.

    Raises:
        AnswerError: see `complete`; or a server counts other prompts or answers than were asked for.
    """
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits, trust_env=False) as client:
        started = time.perf_counter()
        answers = await asyncio.gather(*(complete(client, body) for body in bodies))
        seconds = time.perf_counter() - started
    for body, answer in zip(bodies, answers, strict=True):
        counts = (answer.prompt_tokens, answer.tokens)
        if counts != (prompt_tokens, body["max_tokens"]) or not answer.arrivals:
            raise AnswerError(
                f"{body['model']}: {counts} prompt and answer tokens, {len(answer.arrivals)} pieces; "
                f"asked for {prompt_tokens} and {body['max_tokens']}"
            )
    gaps = [
        later - sooner for a in answers for sooner, later in zip(a.arrivals, a.arrivals[1:], strict=False)
    ]
    return Run(
        tokens=sum(answer.tokens for answer in answers),
        seconds=seconds,
        first_token_s=[answer.arrivals[0] - answer.sent for answer in answers],
        gaps_s=gaps,
        texts=[answer.text for answer in answers],
    )
