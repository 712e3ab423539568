"""What answers that follow a grammar cost against free text, many at once.

    python benchmarks/structured.py [--base DIR] [--requests 16] [--tokens 64] [--repeats 9]

The engine is the server's own over the demo pool, or over another base. Every answer has the same number of
tokens: free text ignores its end, and the grammars have none so soon. The cases take turns, and a ratio is
the median over the turns, so that other work on the machine changes little; processor time, of all threads,
is what it changes least.
"""

import argparse
import asyncio
import runpy
import time
from collections.abc import Mapping
from contextlib import aclosing
from itertools import count
from pathlib import Path
from statistics import median

from loramux.server.build import build
from loramux.server.engine.protocol import Engine, Sampling, Token, Work
from loramux.server.parts import Parts
from loramux.server.settings import load_settings
from loramux.server.text.grammar import json_grammar, regex_grammar

for _package in ("benchmarks", "tests"):
    runpy.run_path(str(Path(__file__).parent / "run.py"))["add_package"](_package)

from benchmarks.rig import alternate  # noqa: E402

FREE = "free text"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 4},
        "age": {"type": "integer"},
        "is_old": {"type": "boolean"},
    },
    "required": ["name", "age", "is_old"],
    "additionalProperties": False,
}  # fmt: skip
GRAMMARS: Mapping[str, str | None] = {
    FREE: None,
    "JSON Schema": json_grammar({"type": "array", "items": PERSON, "minItems": 500}),
    "regular expression": regex_grammar("([a-z]{2,9}[ ,.]){500}"),
}
SAMPLINGS = {"greedy": {"temperature": 0.0}, "drawn": {"temperature": 0.9, "top_p": 0.95}}


async def drive(
    engine: Engine, names: "count[int]", prompt: tuple[int, ...], requests: int, tokens: int,
    grammar: str | None, sampling: Mapping[str, float],
) -> tuple[float, float]:  # fmt: skip
    """Seconds by the clock and of processor time that so many requests at once take."""

    async def one(number: int) -> int:
        chosen = Sampling(max_tokens=tokens, seed=number, ignore_eos=True, **sampling)  # type: ignore[arg-type]
        work = Work(f"w{next(names)}", (*prompt, 5 + number), chosen, grammar=grammar)
        async with aclosing(engine.run(work)) as events:
            return sum([isinstance(event, Token) async for event in events])

    started, used = time.perf_counter(), time.process_time()
    found = sum(await asyncio.gather(*(one(number) for number in range(requests))))
    assert found == requests * tokens, f"{found} tokens in place of {requests * tokens}"
    return time.perf_counter() - started, time.process_time() - used


async def measure(parts: Parts, requests: int, tokens: int, repeats: int) -> None:
    """Print a line a case."""
    prompt = await parts.prompts.text("Write about the points of all drivers in the season.")
    await parts.engine.start()
    names = count()
    for name, sampling in SAMPLINGS.items():
        cases = {
            case: lambda g=grammar, s=sampling: drive(parts.engine, names, prompt, requests, tokens, g, s)
            for case, grammar in GRAMMARS.items()
        }
        for case in cases.values():
            await case()  # compiles the grammar, and what the engine makes at first use
        found = await alternate(cases, repeats)
        for case, times in found.items():
            pairs = list(zip(times, found[FREE], strict=True))
            clock, processor = (median(free[n] / own[n] for own, free in pairs) for n in (0, 1))
            rate = requests * tokens / median(seconds for seconds, _ in times)
            print(f"{name:7} {case:20} {rate:8.0f} tokens/s: {clock:.3f} of free text by the clock, "
                  f"{processor:.3f} by processor time", flush=True)  # fmt: skip
    await parts.engine.stop(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--base", type=Path, help="another base than the demo pool's")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    chosen = parser.parse_args()
    flags = {} if chosen.base is None else {"base": str(chosen.base)}
    asyncio.run(measure(build(load_settings(flags=flags)), chosen.requests, chosen.tokens, chosen.repeats))


if __name__ == "__main__":
    main()
