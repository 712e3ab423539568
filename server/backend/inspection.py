"""Whether a backend is what loramux has to have behind it; asked before the first use and after a loss."""

import json
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux.server.backend.errors import BackendError
from loramux.server.backend.protocol import AdapterBackend, Backend, BackendFacts
from loramux.server.engine.protocol import Sampling, Token, Work

#: Letters, digits, spaces, an accent and a sign of several bytes: where vocabularies of a size differ.
SAMPLE = "The 3 naïve foxes said: “no”, 1,024 times (€7).\n\tdef f(x): return x ** 2"
_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_PUSH = 50.0
_CERTAIN = -1e-6


@dataclass(frozen=True, slots=True)
class ExpectedBase:
    """The base that the pool is for.

    Attributes:
        ours: what the pool calls it.
        names: what else it may be called.
        folder: its files here.
        tokens: `SAMPLE` in its vocabulary.
        trusted: the operator vouches for the backends' base, whatever they call it.
    """

    ours: str
    names: frozenset[str]
    folder: Path
    tokens: tuple[int, ...]
    trusted: bool = False


async def inspect_base(server: Backend, base: ExpectedBase) -> BackendFacts:
    """Ask a backend what it is.

    Raises:
        BackendError: it holds another base, or answers in a way that cannot be passed on.
    """
    facts = await server.facts()
    _check_name(server.url, facts, base)
    tokens = await server.tokens(SAMPLE)
    if tokens != list(base.tokens):
        raise BackendError(
            f"backend {server.url}: the vocabulary of {facts.base!r} is not that of the pool's base "
            f"{base.ours!r}"
        )
    await _check_answers(server, facts, base.tokens[:8])
    return facts


async def inspect_adapters(server: AdapterBackend, name: str, path: str) -> None:
    """Load the adapter of a directory, and unload it.

    Raises:
        BackendError: it cannot; the message says which option of it is missing or too small.
    """
    await server.load(name, path)
    await server.unload(name)


def _check_name(url: str, facts: BackendFacts, base: ExpectedBase) -> None:
    folder = Path(facts.root)
    seen = bool(facts.root) and folder.is_absolute() and folder.is_dir()
    if seen and folder.resolve() == base.folder.resolve():
        return
    ours = base.ours
    if seen and (theirs := _shape(folder)) and (own := _shape(base.folder)) and theirs != own:
        field = next(name for name in _SHAPE if theirs.get(name) != own.get(name))
        raise BackendError(
            f"backend {url}: it holds another base than {ours!r}: {folder} has {field} "
            f"{theirs.get(field)}, not {own.get(field)}"
        )
    if not base.trusted and not base.names & {facts.base, facts.root, folder.name}:
        raise BackendError(
            f"backend {url}: it serves {facts.base!r} (from {facts.root or 'an unnamed place'}), and the "
            f"pool is for {ours!r}",
            f"if they are the same, start it with --served-model-name {ours} or set backend.any_base",
        )


def _shape(folder: Path) -> Mapping[str, Any] | None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return {name: config.get(name) for name in _SHAPE} if isinstance(config, dict) else None


async def _check_answers(server: Backend, facts: BackendFacts, prompt: tuple[int, ...]) -> None:
    """One token, pushed by a bias to be one of the prompt's: it has to come with its id, and with the
    probability that it had before the push."""
    pushed = prompt[-1]
    sampling = Sampling(
        max_tokens=1, temperature=0.0, logit_bias={pushed: _PUSH}, ignore_eos=True, logprobs=1
    )
    async with aclosing(server.stream(Work("inspection", prompt, sampling), {})) as found:
        events = [event async for event in found]
    scores = [event.score for event in events if isinstance(event, Token)]
    if [score.id for score in scores] != [pushed] or scores[0].logprob is None:
        raise BackendError(
            f"backend {server.url}: {facts.kind} {facts.version} does not report tokens and "
            "log-probabilities as asked",
            "loramux knows vLLM from 0.10.2 on",
        )
    if scores[0].logprob > _CERTAIN:
        raise BackendError(
            f"backend {server.url}: its log-probabilities are taken after the sampling parameters",
            "start it with --logprobs-mode raw_logprobs",
        )
