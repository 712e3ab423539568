"""Works, events, mixtures and errors as JSON, and back."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from loramux.adapters.blend import Blend, BlendPart
from loramux.adapters.errors import AdapterError, BlendError
from loramux.adapters.lora import LoraAdapter
from loramux.adapters.residency import Lease
from loramux.adapters.sparse.token_mixtures import TokenMethod, TokenMixture
from loramux.server.engine.protocol import (
    EngineClosed,
    EngineError,
    EngineExhausted,
    EngineOverloaded,
    Event,
    Finished,
    GrammarError,
    PromptScored,
    Sampling,
    Started,
    Token,
    TokenScore,
    Work,
)
from loramux.server.leases import Mixture, SparseChoice

Json = dict[str, Any]


def work_body(work: Work) -> Json:
    """All of a work but its adapter."""
    sampling = asdict(work.sampling)
    sampling["logit_bias"] = [[token, value] for token, value in work.sampling.logit_bias.items()]
    sampling["stop_token_ids"] = sorted(work.sampling.stop_token_ids)
    return {
        "id": work.id,
        "prompt": work.prompt,
        "sampling": sampling,
        "prompt_logprobs": work.prompt_logprobs,
        "grammar": work.grammar,
        "answered": work.answered,
    }


def work_of(body: Json, adapter: object) -> Work:
    """A work with the adapter that is given."""
    sampling = body["sampling"]
    answered = body["answered"]
    return Work(
        body["id"],
        tuple(body["prompt"]),
        Sampling(
            **{
                **sampling,
                "logit_bias": dict(sampling["logit_bias"]),
                "stop_token_ids": frozenset(sampling["stop_token_ids"]),
            }
        ),
        adapter,
        body["prompt_logprobs"],
        body["grammar"],
        None if answered is None else tuple(answered),
    )


def event_body(event: Event) -> list[Any]:
    """An event; a token without log-probabilities, the most frequent one, is its id alone."""
    match event:
        case Token(score):
            return [score.id] if score.logprob is None else ["token", _score_body(score)]
        case Started():
            return ["started", event.cached_tokens]
        case PromptScored():
            return ["prompt", [_score_body(score) for score in event.scores]]
        case Finished():
            last = event.score and _score_body(event.score)
            return ["finished", event.reason, event.stop_token, last, event.cached_tokens]


def event_of(body: list[Any]) -> Event:
    """The event again."""
    match body:
        case [int(token)]:
            return Token(TokenScore(token))
        case ["token", score]:
            return Token(_score_of(score))
        case ["started", cached]:
            return Started(cached)
        case ["prompt", scores]:
            return PromptScored(tuple(map(_score_of, scores)))
        case ["finished", reason, stop, score, cached]:
            return Finished(reason, stop, None if score is None else _score_of(score), cached)
    raise ValueError(f"no event: {body!r}")


def _score_body(score: TokenScore) -> list[Any]:
    return [score.id, score.logprob, score.top]


def _score_of(body: list[Any]) -> TokenScore:
    token, logprob, top = body
    return TokenScore(token, logprob, tuple((other, value) for other, value in top))


def mixture_body(mixture: Mixture) -> Json:
    """What has to be leased, without tensors."""
    match mixture:
        case SparseChoice():
            return {"sparse": mixture.id}
        case TokenMixture():
            named = {expert.content_hash: expert.id for expert in mixture.experts}
            return {
                "tokens": mixture.method,
                "among": named,
                "top_k": mixture.top_k,
                "temperature": mixture.temperature,
            }
    fields = {name: getattr(mixture, name) for name in ("method", "rank", "density", "seed", "grid")}
    return {"blend": mixture.parts, **fields}


def mixture_of(body: Json, experts: Mapping[str, LoraAdapter]) -> Mixture:
    """The mixture again, over the experts of this process by id.

    Raises:
        BlendError: an expert that tokens choose among is not among them (any more).
    """
    if "sparse" in body:
        return SparseChoice(body["sparse"])
    if "tokens" in body:
        found = []
        for content, name in body["among"].items():
            expert = experts.get(name)
            if expert is None or expert.content_hash != content:
                raise BlendError(f"the expert {name!r} is not in the pool any more")
            found.append(expert)
        return TokenMixture.of(
            TokenMethod(body["tokens"]), found, top_k=body["top_k"], temperature=body["temperature"]
        )
    parts = tuple(BlendPart(*part) for part in body["blend"])
    return Blend(parts, body["method"], body["rank"], body["density"], body["seed"], body["grid"])


def lease_body(lease: Lease) -> Json:
    """What a lease reports; its handle stays where it is."""
    return {
        "key": lease.key,
        "method": lease.method,
        "rank": lease.rank,
        "relative_error": lease.relative_error,
        "cached": lease.cached,
        "seconds": lease.seconds,
    }


class Unexpected(RuntimeError):
    """A fault of the replica's own; its log has the rest."""


#: First match wins, so a subclass stands before its base.
_ERRORS: tuple[tuple[type[Exception], str, Callable[[Json], Exception]], ...] = (
    (EngineOverloaded, "overloaded", lambda body: EngineOverloaded(body["waiting"], body["retry_after"])),
    (EngineExhausted, "exhausted", lambda body: EngineExhausted(body["message"])),
    (EngineClosed, "closed", lambda body: EngineClosed(body["message"])),
    (GrammarError, "grammar", lambda body: GrammarError(body["message"])),
    (EngineError, "engine", lambda body: EngineError(body["message"])),
    (BlendError, "blend", lambda body: BlendError(body["message"])),
    (AdapterError, "adapter", lambda body: AdapterError(body["message"])),
)


def error_body(error: Exception) -> Json:
    """An error, as much of it as its like on the other side needs."""
    for kind, name, _ in _ERRORS:
        if isinstance(error, kind):
            body: Json = {"kind": name, "message": str(error)}
            if isinstance(error, EngineOverloaded):
                body |= {"waiting": error.waiting, "retry_after": error.retry_after}
            return body
    return {"kind": "unexpected", "message": f"{type(error).__name__}: {error}"}


def error_of(body: Json) -> Exception:
    """The error again."""
    for _, name, make in _ERRORS:
        if body["kind"] == name:
            return make(body)
    return Unexpected(body["message"])
