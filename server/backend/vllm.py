"""vLLM behind us: adapters by name, tokens in and tokens out over `/v1/completions`."""

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from loramux.server.backend.connection import Connection, Refused
from loramux.server.backend.errors import BackendDown, BackendError, BlendForgotten
from loramux.server.backend.protocol import BackendFacts
from loramux.server.engine.protocol import (
    LEAST_TEMPERATURE,
    EngineOverloaded,
    Event,
    Finished,
    GrammarError,
    PromptScored,
    Started,
    Token,
    TokenScore,
    Work,
)

COMPLETIONS = "/v1/completions"
#: What `max_lora_rank` may be, and so how wide an adapter is in its memory.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Only llguidance reads this line; others that vLLM would try first refuse the grammar.
_LLGUIDANCE = "%llguidance {}\n"
_TOKEN = "token_id:"  # noqa: S105
_NOT_FOUND = 404
_BAD_REQUEST = 400
_TOO_MANY = 429


@dataclass(frozen=True, slots=True)
class EndTokens:
    """The tokens that end an answer of the base, and those that end a grammar."""

    answer: frozenset[int]
    grammar: frozenset[int] = frozenset()


class VllmBackend:
    """Implements `AdapterBackend`.

    The request names every sampling parameter, so that the defaults which the server takes from the model's
    files have no say, and ends on our own end tokens.
    """

    def __init__(self, connection: Connection, ends: EndTokens) -> None:
        self._http = connection
        self._ends = ends
        self._base = ""

    @property
    def url(self) -> str:
        return self._http.url

    async def open(self) -> None:
        await self._http.open()

    async def close(self) -> None:
        await self._http.close()

    async def alive(self) -> None:
        await self._http.reach("/health")

    async def facts(self) -> BackendFacts:
        version = await self._get("/version", "version")
        cards = await self._get("/v1/models", "data")
        base = next((card for card in cards if not card.get("parent")), None)
        if base is None or not isinstance(base.get("max_model_len"), int):
            raise BackendError(f"backend {self.url}: /v1/models names no base with its max_model_len")
        self._base = str(base["id"])
        return BackendFacts(
            kind="vllm",
            version=str(version),
            base=self._base,
            root=str(base.get("root") or ""),
            max_context=base["max_model_len"],
            adapters={str(card["id"]): str(card.get("root")) for card in cards if card.get("parent")},
        )

    async def tokens(self, text: str) -> list[int]:
        body = {"model": self._base, "prompt": text, "add_special_tokens": False}
        found = await self._http.post("/tokenize", body)
        return list(found["tokens"]) if isinstance(found, dict) else []

    async def load(self, name: str, path: str) -> None:
        try:
            await self._http.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        except Refused as error:
            # A name is the digest of what it stands for: who is there already is the same.
            if error.status == _BAD_REQUEST and "already been loaded" in error.message:
                return
            raise self._explained(error, path) from None

    async def unload(self, name: str) -> None:
        try:
            await self._http.post("/v1/unload_lora_adapter", {"lora_name": name})
        except Refused as error:
            if error.status != _NOT_FOUND:
                raise

    def can_resume(self, work: Work) -> bool:
        return can_resume(work)

    async def stream(self, work: Work, mixture: Mapping[str, object]) -> AsyncGenerator[Event]:
        body = self._body(work) | dict(mixture)
        try:
            if work.prompt_logprobs is not None:
                scores = await self._prompt_scores(work, body)
                yield Started()
                yield PromptScored(scores)
            elif not body["max_tokens"]:
                yield Started()
            if not body["max_tokens"]:
                yield Finished("length")
                return
            async with aclosing(self._http.events(COMPLETIONS, body)) as chunks:
                async for event in self._tokens(work, chunks, started=work.prompt_logprobs is not None):
                    yield event
        except Refused as error:
            raise self._failure(error, work, str(body["model"])) from None

    async def _tokens(
        self, work: Work, chunks: AsyncGenerator[dict[str, Any]], *, started: bool
    ) -> AsyncGenerator[Event]:
        stops = self._stops(work)
        ended: Finished | None = None
        try:
            async for chunk in chunks:
                for choice in chunk.get("choices") or ():
                    if not started:
                        started = True
                        yield Started()
                    scores = self._scores(choice, work.sampling.logprobs)
                    reason = choice.get("finish_reason")
                    last = scores[-1] if reason == "stop" and scores and scores[-1].id in stops else None
                    for score in scores if last is None else scores[:-1]:
                        yield Token(score)
                    if reason in ("stop", "length"):
                        ended = Finished(reason, None if last is None else last.id, last)
                    elif reason is not None:
                        raise BackendError(f"backend {self.url}: the sequence ended with {reason!r}")
                if ended is not None and chunk.get("usage"):
                    # What a request of our own has just scored was found, but not spared.
                    known = work.prompt_logprobs is None and work.answered is None
                    ended = replace(ended, cached_tokens=cached_tokens(chunk["usage"]) if known else 0)
                    break
        except BackendDown:
            if ended is None:
                raise
        if ended is None:
            raise BackendError(f"backend {self.url}: the answer ended without a finish reason")
        yield ended

    def _scores(self, choice: Mapping[str, Any], wanted: int | None) -> list[TokenScore]:
        """The tokens of a chunk."""
        ids = choice.get("token_ids")
        if ids is None:
            raise BackendError(
                f"backend {self.url}: answers have no token_ids", "vLLM 0.10.2 or newer is needed"
            )
        if wanted is None:
            return [TokenScore(token) for token in ids]
        found = choice.get("logprobs") or {}
        own, top = found.get("token_logprobs") or (), found.get("top_logprobs") or ()
        if len(own) != len(ids) or len(top) != len(ids):
            raise BackendError(
                f"backend {self.url}: {len(ids)} tokens came with {len(own)} log-probabilities"
            )
        return [
            TokenScore(token, logprob, likeliest(table or {}, wanted))
            for token, logprob, table in zip(ids, own, top, strict=True)
        ]

    async def _prompt_scores(self, work: Work, body: Mapping[str, object]) -> tuple[TokenScore, ...]:
        """Scored by a request of its own, for a stream has none; its keys and values serve the stream too."""
        left_out = ("stream", "stream_options", "structured_outputs", "logprobs", "seed")
        asked = {name: value for name, value in body.items() if name not in left_out}
        asked |= {"max_tokens": 1, "prompt_logprobs": work.prompt_logprobs}
        answer = await self._http.post(COMPLETIONS, asked)
        try:
            rows = answer["choices"][0]["prompt_logprobs"]
            first, *rest = work.prompt
            scores = [TokenScore(first)]
            for token, row in zip(rest, rows[1:], strict=True):
                table = {id: float(entry["logprob"]) for id, entry in row.items()}
                top = likeliest(table, work.prompt_logprobs or 0)
                scores.append(TokenScore(token, table[str(token)], top))
        except (KeyError, TypeError, ValueError):
            raise BackendError(
                f"backend {self.url}: the prompt's log-probabilities are not as asked"
            ) from None
        return tuple(scores)

    def _body(self, work: Work) -> dict[str, object]:
        sampling, answered = work.sampling, work.answered or ()
        body: dict[str, object] = {
            "model": self._base,
            "prompt": [*work.prompt, *answered],
            "max_tokens": sampling.max_tokens - len(answered),
            "temperature": sampling.temperature if sampling.temperature >= LEAST_TEMPERATURE else 0.0,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "repetition_penalty": sampling.repetition_penalty,
            "stop_token_ids": sorted(self._stops(work)),
            "ignore_eos": True,
            "add_special_tokens": False,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        if sampling.logprobs is not None:
            body["logprobs"] = sampling.logprobs
        if sampling.logit_bias:
            body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
        if work.grammar is not None:
            body["structured_outputs"] = {"grammar": lark(work.grammar)}
        return body

    def _stops(self, work: Work) -> frozenset[int]:
        own = frozenset[int]() if work.sampling.ignore_eos else self._ends.answer
        return work.sampling.stop_token_ids | (own if work.grammar is None else own | self._ends.grammar)

    def _failure(self, error: Refused, work: Work, model: str) -> Exception:
        if error.status == _NOT_FOUND and model != self._base:
            return BlendForgotten(f"backend {self.url}: it does not know {model} any more")
        if error.status == _TOO_MANY:
            return EngineOverloaded(0)
        if error.status == _BAD_REQUEST and work.grammar is not None:
            return GrammarError(f"the backend takes no such grammar: {error.message}")
        return error

    def _explained(self, error: Refused, path: str) -> BackendError:
        """Why an adapter was not loaded, with the way out."""
        if error.status == _NOT_FOUND and "adapter" not in error.message.lower():
            way = "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora"
        elif error.status == _NOT_FOUND:
            way = f"it does not see {path}; name the folder as it sees it in backend.folder_there"
        elif "max_lora_rank" in error.message:
            way = "set backend.max_lora_rank to its --max-lora-rank"
        else:
            return error
        return BackendError(str(error), way)

    async def _get(self, path: str, key: str) -> Any:
        try:
            found = await self._http.get(path)
        except Refused as error:
            raise BackendError(error.what, error.way or "is it vLLM?") from None
        if not isinstance(found, dict) or key not in found:
            raise BackendError(f"backend {self.url}: {path} has no {key!r}", "is it vLLM?")
        return found[key]


def can_resume(work: Work) -> bool:
    """Whether the tokens so far, as the end of a prompt, make vLLM go on as it would have done.

    They do not where it counts tokens of the answer: for a seeded draw, a penalty on what was said, or the
    place in a grammar. A draw without a seed has no tokens that it would have had, only their distribution.
    """
    sampling = work.sampling
    greedy = sampling.temperature < LEAST_TEMPERATURE
    penalised = bool(sampling.presence_penalty or sampling.frequency_penalty)
    return (greedy or sampling.seed is None) and not penalised and work.grammar is None


def cached_tokens(usage: Mapping[str, Any]) -> int:
    """Of a prompt, those that were in the cache; vLLM tells with `--enable-prompt-tokens-details` alone, and
    leaves a zero out."""
    found = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    return found if isinstance(found, int) else 0


def lark(grammar: str) -> str:
    """A grammar of ours as Lark, marked so that vLLM gives it to llguidance, which compiles ours as well."""
    if not grammar.startswith("{"):
        return f"{_LLGUIDANCE}{grammar}"
    (only,) = json.loads(grammar)["grammars"]
    return f"{_LLGUIDANCE}start: %json {json.dumps(only['json_schema'])}"


def likeliest(table: Mapping[str, float], count: int) -> tuple[tuple[int, float], ...]:
    """The `count` best of a table of log-probabilities by token, which may hold the sampled token as well."""
    pairs: Sequence[tuple[int, float]] = [
        (int(name.removeprefix(_TOKEN)), logprob) for name, logprob in table.items()
    ]
    return tuple(sorted(pairs, key=lambda pair: -pair[1])[:count])
