"""Nothing is timed before it is right: the engine's log-probabilities against runs alone and float64."""

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.judge import Judge
from benchmarks.rig import Rig
from loramux.adapters.blend import Blend
from loramux.server.engine.protocol import Sampling

TOKENS = 8
#: Of the six requests of the mixed batch: the bare base and two blends.
JUDGED = 3
#: The engine's rounding, of that of an ordinary run: two samples of one spread differ by less.
TIMES_ROUNDING = 3.0
#: Nats; in float32 the order of a sum is all there is.
LEAST_BOUND = 1e-4


class Wrong(SystemExit):
    """What was to be timed computes something else; the message says what."""


async def scores(rig: Rig, prompt: Sequence[int], blend: Blend, answer: int) -> list[float]:
    """Log-probabilities of an answer that says token `answer` all the time, however unlikely it is.

    Forced, because the best token of random weights changes with the last bits.
    """
    sampling = Sampling(0, temperature=0, logit_bias={answer: 1e4}, logprobs=0)
    found = [token.score async for token in rig.tokens(prompt, blend, TOKENS, sampling)]
    if any(score.id != answer or score.logprob is None for score in found):
        raise Wrong("the engine did not say the token it was made to say; nothing was timed")
    return [score.logprob or 0.0 for score in found]


async def check(rig: Rig, folder: Path | None) -> None:
    """A mixed batch says what its requests say alone, and both what float64 says of them.

    How far from float64 they may be is measured: by what an ordinary run of transformers in the served type
    is off, for the same answers. Whatever the size of the base, what is left to the engine is rounding.

    Args:
        rig: with a pool.
        folder: the base's checkpoint, where the served weights are packed or to be checked too; `None` takes
            the served ones.

    Raises:
        Wrong: it does not, or the blends change too little to be told from rounding.
    """
    blends = [rig.mixture(number) if number % 3 else Blend.bare() for number in range(6)]
    jobs = [(rig.prompt(9 + 7 * number), blend, 7 + number) for number, blend in enumerate(blends)]
    alone = [await scores(rig, *job) for job in jobs]
    together = list(await asyncio.gather(*(scores(rig, *job) for job in jobs)))
    source = rig.model
    if folder is not None:
        source = AutoModelForCausalLM.from_pretrained(folder, dtype=rig.model.dtype).to(rig.model.device)
    exact, ordinary = Judge(source, torch.float64), Judge(source, rig.model.dtype)
    judged = jobs[:JUDGED]
    wanted = [_judge(exact, rig, *job) for job in judged]
    rounding = _gap([_judge(ordinary, rig, *job) for job in judged], wanted)
    bound = max(LEAST_BOUND, TIMES_ROUNDING * rounding)
    _compare("isolated runs and float64", alone[:JUDGED], wanted, bound)
    _compare("a mixed batch and float64", together[:JUDGED], wanted, bound)
    _compare("a mixed batch and its isolated runs", together, alone, 2 * bound)
    prompt, _, answer = judged[1]
    bare = _judge(exact, rig, prompt, Blend.bare(), answer)
    if (effect := _gap([bare], [wanted[1]])) < 2 * bound:
        raise Wrong(
            f"the blend changes {effect:.1e} nats, too little to be judged to {bound:.1e}; nothing was timed"
        )


def _judge(judge: Judge, rig: Rig, prompt: Sequence[int], blend: Blend, answer: int) -> list[float]:
    parts = [(rig.residency.experts[part.expert_id], part.weight) for part in blend.parts]
    return judge.scores(prompt, [answer] * TOKENS, parts)


def _gap(found: list[list[float]], wanted: list[list[float]]) -> float:
    """The largest root mean square, over the tokens of an answer, of the difference."""
    pairs = zip(found, wanted, strict=True)
    return max(math.dist(one, other) / math.sqrt(len(other)) for one, other in pairs)


def _compare(what: str, found: list[list[float]], wanted: list[list[float]], bound: float) -> None:
    if not (gap := _gap(found, wanted)) <= bound:
        raise Wrong(f"{what} differ by {gap:.1e} > {bound:.1e} nats; nothing was timed")
