"""Log-probabilities as OpenAI shows them."""

from typing import Any

from loramux.server.engine.protocol import TokenScore
from loramux.server.events import ScoredToken
from loramux.server.text.vocabulary import Vocabulary

FLOOR = -9999.0


def chat_entry(vocabulary: Vocabulary, token: ScoredToken) -> dict[str, Any]:
    """One entry of a chat choice's `logprobs.content`."""
    score = token.score
    return {
        **_described(vocabulary, score.id, score.logprob),
        "top_logprobs": [_described(vocabulary, other, logprob) for other, logprob in score.top],
    }


def completion_entry(vocabulary: Vocabulary, token: ScoredToken) -> dict[str, Any]:
    """What `completion_logprobs` needs of a token; the first of a prompt has no log-probability."""
    score = token.score
    return {
        "token": vocabulary.name(score.id),
        "text": token.text,
        "logprob": _finite(score.logprob),
        "top": _top(vocabulary, score),
    }


def _top(vocabulary: Vocabulary, score: TokenScore) -> dict[str, float | None] | None:
    if score.logprob is None:
        return None
    top: dict[str, float | None] = {}
    for other, logprob in score.top:
        # Tokens of broken UTF-8 can share a name; the likeliest comes first and keeps it.
        top.setdefault(vocabulary.name(other), _finite(logprob))
    return top


def _described(vocabulary: Vocabulary, token: int, logprob: float | None) -> dict[str, Any]:
    name = vocabulary.name(token)
    return {"token": name, "logprob": _finite(logprob), "bytes": list(vocabulary.pieces.get(token, b""))}


def _finite(logprob: float | None) -> float | None:
    """JSON has no minus infinity."""
    return None if logprob is None else max(logprob, FLOOR)
