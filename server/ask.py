"""What a client asked for, understood and checked: the request that the pipeline works on."""

import hashlib
from dataclasses import dataclass, replace

from loramux.server.engine.protocol import Sampling
from loramux.server.toolkit import ToolUse
from loramux.server.wire.generation import RoutingFields


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: `text` as given (decoded, if given as ids), its `tokens`, and how many may follow."""

    text: str
    tokens: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Sequence:
    """One sequence to generate: choice `index` of the answer. `prompt_logprobs` and `explains`: its prompt is
    scored, and that is part of the explanation."""

    index: int
    prompt: Prompt
    sampling: Sampling
    prompt_logprobs: int | None = None
    explains: bool = False


@dataclass(frozen=True, slots=True)
class Ask:
    """A request. All its prompts are routed together, on `routing_text`, and share one blend.

    `grammar`, in llguidance's form, is what every answer follows; `tools` is what it may call. `score_end`:
    the token that ends a sequence has a score of its own in the answer, as completions have it.
    """

    model: str
    prompts: tuple[Prompt, ...]
    routing_text: str
    sampling: Sampling
    n: int = 1
    stop: tuple[str, ...] = ()
    lora: tuple[tuple[str, float], ...] | None = None
    routing: RoutingFields | None = None
    echo: bool = False
    prompt_logprobs: int | None = None
    grammar: str | None = None
    tools: ToolUse | None = None
    score_end: bool = False

    @property
    def prompt_tokens(self) -> int:
        """As OpenAI counts them: each prompt once, whatever `n` is."""
        return sum(len(prompt.tokens) for prompt in self.prompts)

    @property
    def explains(self) -> bool:
        """Whether the answer says what routing did to the prompt's own loss."""
        return self.routing is not None and self.routing.explain

    def sequences(self) -> list[Sequence]:
        """Every choice of every prompt, in the order of the answer."""
        return [
            Sequence(
                index=position * self.n + choice,
                prompt=prompt,
                sampling=replace(
                    self.sampling, max_tokens=prompt.max_tokens, seed=choice_seed(self.sampling.seed, choice)
                ),
                # Of several choices the first scores the prompt that they share.
                prompt_logprobs=0
                if self.explains and choice == 0 and self.prompt_logprobs is None
                else self.prompt_logprobs,
                explains=self.explains and choice == 0,
            )
            for position, prompt in enumerate(self.prompts)
            for choice in range(self.n)
        ]


def choice_seed(seed: int | None, choice: int) -> int | None:
    """The seed of one of `n` choices: the first has the request's own, so that raising `n` keeps it."""
    if seed is None or choice == 0:
        return seed
    digest = hashlib.sha256(f"{seed}:{choice}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
