"""What must hold before anything is timed: answers are there, adapters act, and say what PEFT says."""

from __future__ import annotations

from .client import Mixture, Run
from .engines import Engine, Loramux, Peft
from .files import EXPERTS, prompts

TOKENS = 16
BLEND: Mixture = (("e0", 0.6), ("e1", 0.3), ("e3", 0.1))


class WrongAnswerError(RuntimeError):
    """An engine answers, but not what it was asked."""


async def check(engine: Engine, measure: dict[str, list[str]] | None, *, strict: bool) -> dict[str, str]:
    """Compare greedy answers of 16 tokens.

    Every answer has text; one with an adapter differs from the base's, and from another adapter's. Where PEFT
    runs, its answers are the measure: for the base, for every adapter, and its `cat` merge for a blend.

    Args:
        engine: the one to look at, started.
        measure: `answers_of` PEFT.
        strict: loramux must agree with PEFT in every answer (float32); else agreement is only counted.

    Raises:
        WrongAnswerError: one of these does not hold.
    """
    asked = prompts(engine.files.tokenizer(), len(EXPERTS), "check")
    answers: dict[str, Run] = {"base": await engine.run(asked, [()] * len(asked), TOKENS)}
    if "adapter" in engine.can:
        answers["adapter"] = await _adapters_act(engine, answers["base"].texts)
    if "blend" in engine.can:
        answers["blend"] = await engine.run(asked, [BLEND] * len(asked), TOKENS)
    for kind, run in answers.items():
        if not all(text.strip() for text in run.texts):
            raise WrongAnswerError(f"{engine.name}: an empty answer ({kind})")
    if measure is None:
        return dict.fromkeys(answers, "not compared: peft does not run")
    found = {}
    for kind, run in answers.items():
        expected = measure[kind]
        equal = sum(mine == theirs for mine, theirs in zip(run.texts, expected, strict=True))
        found[kind] = f"{equal} of {len(expected)} as PEFT's"
        if strict and isinstance(engine, Loramux) and equal < len(expected):
            raise WrongAnswerError(f"{engine.name}: {kind}: {found[kind]}: {run.texts} against {expected}")
    return found


async def _adapters_act(engine: Engine, base: list[str]) -> Run:
    """Answers with one adapter each, after a look at those with the next one."""
    asked = prompts(engine.files.tokenizer(), len(EXPERTS), "check")
    adapters: list[Mixture] = [((name, 1.0),) for name in EXPERTS]
    answers = await engine.run(asked, adapters, TOKENS)
    others = await engine.run(asked, [*adapters[1:], adapters[0]], TOKENS)
    for name, mine, without, other in zip(EXPERTS, answers.texts, base, others.texts, strict=True):
        if mine in (without, other):
            raise WrongAnswerError(f"{engine.name}: adapter {name} changes nothing: {mine!r}")
    return answers


async def answers_of(peft: Peft) -> dict[str, list[str]]:
    """PEFT's answers to the prompts of the check, by kind of mixture."""
    tokenizer = peft.files.tokenizer()
    asked = prompts(tokenizer, len(EXPERTS), "check")
    experts, weights = zip(*BLEND, strict=True)
    await peft.order(do="blend", name="check-blend", experts=experts, weights=weights)
    names = {
        "base": ["__base__"] * len(asked),
        "adapter": list(EXPERTS),
        "blend": ["check-blend"] * len(asked),
    }
    rows = {kind: (await peft.ids(asked, named, TOKENS))["ids"] for kind, named in names.items()}
    return {kind: [tokenizer.decode(row) for row in answers] for kind, answers in rows.items()}
