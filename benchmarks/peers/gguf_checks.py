"""What must hold before anything is timed: with the same adapters both servers say nearly the same."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .checks import WrongAnswerError
from .client import Mixture
from .gguf_engines import GgufServer
from .gguf_files import BLEND_WEIGHTS, GgufFiles

TOKENS = 24
#: llama.cpp rounds what it multiplies blocks with to 8 bits, loramux does not, so probabilities differ a
#: little: by no more than this share of what an adapter changes.
TOLERANCE = 0.25


@dataclass(frozen=True)
class Said:
    """A greedy answer, the log-probability of its first token, and the tokens of the prompt."""

    text: str
    first: float
    prompt_tokens: int

    @classmethod
    def of(cls, answer: dict[str, Any]) -> Said:
        choice = answer["choices"][0]
        first = float(choice["logprobs"]["content"][0]["logprob"])
        return cls(choice["message"]["content"], first, answer["usage"]["prompt_tokens"])


async def compare_answers(ours: GgufServer, theirs: GgufServer) -> dict[str, str]:
    """Ask both the example prompts of every expert: the base, with their expert, with a blend of two.

    Returns:
        How alike the answers are, by kind of mixture.

    Raises:
        WrongAnswerError: prompts are not the same tokens, an adapter does nothing, or fewer than a third of
            the answers are equal.
    """
    asked = _asked(ours.files)
    found: dict[str, str] = {}
    answers: dict[str, list[tuple[Said, Said]]] = {}
    for kind in ("base", "adapters", "blends"):
        pairs = []
        for question, mixtures in asked:
            one = Said.of(await ours.say(question, mixtures[kind], TOKENS))
            other = Said.of(await theirs.say(question, mixtures[kind], TOKENS))
            if one.prompt_tokens != other.prompt_tokens:
                raise WrongAnswerError(
                    f"{question!r} is {one.prompt_tokens} tokens for {ours.label}, {other.prompt_tokens} for "
                    f"{theirs.label}"
                )
            pairs.append((one, other))
        answers[kind] = pairs
        equal = sum(one.text == other.text for one, other in pairs)
        apart = _apart([one for one, _ in pairs], [other for _, other in pairs])
        found[kind] = f"{equal} of {len(pairs)} answers equal, first tokens {apart:.3f} nats apart"
        if kind != "base":
            effects = [
                _apart([pair[side] for pair in pairs], [pair[side] for pair in answers["base"]])
                for side in (0, 1)
            ]
            found[kind] += f", {effects[0]:.3f} and {effects[1]:.3f} from the base"
            if apart > TOLERANCE * min(effects):
                raise WrongAnswerError(f"{kind}: {found[kind]}: they do not have the same adapters")
        if 3 * equal < len(pairs):
            raise WrongAnswerError(f"{kind}: {found[kind]}: {pairs}")
    return found


def _asked(files: GgufFiles) -> list[tuple[str, dict[str, Mixture]]]:
    """Questions, with the mixture of each kind for them."""
    experts = [expert for expert in files.pool.manifest.experts if expert.examples]
    asked = []
    for number, expert in enumerate(experts):
        pair = (expert.id, experts[(number + 1) % len(experts)].id)
        mixtures: dict[str, Mixture] = {
            "base": (),
            "adapters": ((expert.id, 1.0),),
            "blends": tuple(zip(pair, BLEND_WEIGHTS, strict=True)),
        }
        asked += [(question, mixtures) for question in expert.examples]
    return asked


def _apart(some: Sequence[Said], others: Sequence[Said]) -> float:
    """The mean distance of the probabilities of first tokens; one is enough to tell adapters from none."""
    return statistics.fmean(
        math.fabs(one.first - other.first) for one, other in zip(some, others, strict=True)
    )
