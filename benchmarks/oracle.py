"""Nothing is timed before it is right: the engine's log-probabilities against runs alone and against
transformers on a base with the experts' deltas added into its weights."""

import asyncio
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.rig import Rig
from loramux.adapters.blend import Blend
from loramux.server.engine.protocol import Sampling
from tests.tiny import with_delta

#: Nats between two ways of computing one log-probability.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
TOKENS = 8


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
    """A mixed batch says what its requests say alone, and a blend what its dense sum says.

    Args:
        rig: with a pool.
        folder: the base's checkpoint, for the dense sum; `None` leaves that out.

    Raises:
        Wrong: it does not.
    """
    tolerance = TOLERANCE[rig.model.dtype]
    blends = [rig.mixture(number) if number % 3 else Blend.bare() for number in range(6)]
    jobs = [(rig.prompt(9 + 7 * number), blend, 7 + number) for number, blend in enumerate(blends)]
    alone = [await scores(rig, *job) for job in jobs]
    together = await asyncio.gather(*(scores(rig, *job) for job in jobs))
    _compare("a mixed batch and its isolated runs", list(together), alone, tolerance)
    if folder is not None:
        prompt, blend, answer = jobs[1]
        judge = AutoModelForCausalLM.from_pretrained(folder, dtype=rig.model.dtype).eval()
        parts = [(rig.residency.experts[part.expert_id], part.weight) for part in blend.parts]
        dense = _teacher_forced(with_delta(judge, parts), prompt, answer)
        _compare("a blend and its dense sum", [alone[1]], [dense], tolerance)
        bare = _teacher_forced(judge, prompt, answer)
        if max(abs(a - b) for a, b in zip(bare, dense, strict=True)) < 3 * tolerance:
            raise Wrong("the blend changes too little to be judged; nothing was timed")


@torch.no_grad()
def _teacher_forced(model: PreTrainedModel, prompt: Sequence[int], answer: int) -> list[float]:
    tokens = torch.tensor([[*prompt, *[answer] * (TOKENS - 1)]])
    logits = model(tokens).logits[0, len(prompt) - 1 :].float()
    found: list[float] = logits.log_softmax(dim=-1)[:, answer].tolist()
    return found


def _compare(what: str, found: list[list[float]], wanted: list[list[float]], tolerance: float) -> None:
    pairs = zip(chain.from_iterable(found), chain.from_iterable(wanted), strict=True)
    gap = max(abs(a - b) for a, b in pairs)
    if not gap <= tolerance:
        raise Wrong(f"{what} differ by {gap:.1e} > {tolerance:.0e} nats; nothing was timed")
