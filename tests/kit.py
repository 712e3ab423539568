"""Parts for tests: a byte tokenizer, an engine that says what it is told, a router that looks for words."""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loramux.router.decision import Candidate, Decision, RoutingOptions
from loramux.router.projection import Projection
from loramux.server.engine.protocol import (
    EngineClosed,
    EngineOverloaded,
    EngineStats,
    Event,
    Finished,
    PromptScored,
    Started,
    Token,
    TokenScore,
    Work,
)

#: A whole pool on a base of 6.8 M parameters: small enough to serve in every test (docs/demo.md).
DEMO_POOL = Path(__file__).parent / "demo_pool"

CHAT_TEMPLATE = (
    "<|bos|>{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(merges: Sequence[tuple[str, str]] = (("t", "h"), ("th", "e"), ("Ġ", "the"))) -> Any:
    """A byte-level BPE with every byte, a few merges and the special tokens of the demo base."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    core = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


Script = Callable[[Work], Iterable[int]]


@dataclass
class ScriptedEngine:
    """Implements `Engine`. Every sequence says what `script` gives for its work, then `<|end|>`.

    `gate`, when set, holds every sequence before each token while it is closed. `log` records the starts,
    ends and aborts. `fail_after` raises `failure` after that many tokens of a sequence.
    """

    script: Script
    max_context: int = 512
    max_waiting: int = 1_000
    fail_after: int | None = None
    failure: Exception | None = None
    gate: asyncio.Event | None = None
    log: list[str] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)
    running: int = 0
    open: bool = False
    steps: int = 0

    async def start(self) -> None:
        self.open = True

    async def stop(self, timeout: float) -> None:
        self.open = False

    async def run(self, work: Work) -> AsyncGenerator[Event]:
        if not self.open:
            raise EngineClosed("the engine is closed")
        if self.running >= self.max_waiting:
            raise EngineOverloaded(self.running, retry_after=3)
        self.running += 1
        self.works.append(work)
        self.log.append(f"start {len(self.works)}")
        finished = False
        try:
            yield Started(cached_tokens=0)
            if work.prompt_logprobs is not None:
                yield PromptScored(tuple(self._prompt_scores(work)))
            said = 0
            for token in self.script(work):
                if said == work.sampling.max_tokens:
                    break
                if self.gate is not None:
                    await self.gate.wait()
                await asyncio.sleep(0)
                if self.fail_after == said and self.failure is not None:
                    raise self.failure
                if token in work.sampling.stop_token_ids:
                    finished = True
                    yield Finished("stop", stop_token=token)
                    return
                said += 1
                self.steps += 1
                yield Token(self._score(token, work.sampling.logprobs))
            finished = True
            yield Finished("length" if said == work.sampling.max_tokens else "stop")
        finally:
            self.running -= 1
            self.log.append("finish" if finished else "abort")

    def stats(self) -> EngineStats:
        return EngineStats(running=self.running, steps=self.steps)

    def _score(self, token: int, logprobs: int | None) -> TokenScore:
        if logprobs is None:
            return TokenScore(token)
        top = tuple((token + i, -0.5 - i) for i in range(logprobs))
        return TokenScore(token, -0.5, top)

    def _prompt_scores(self, work: Work) -> list[TokenScore]:
        first, *rest = work.prompt
        return [TokenScore(first), *(self._score(token, work.prompt_logprobs) for token in rest)]


@dataclass
class WordRouter:
    """Implements the router: an expert scores by how often its id is a word of the text."""

    experts: Sequence[str]
    truncate_after: int = 1_000
    asked: list[str] = field(default_factory=list)

    async def decide(self, text: str, options: RoutingOptions) -> Decision:
        self.asked.append(text)
        counts = {expert: text.lower().split().count(expert) for expert in self.experts}
        total = sum(counts.values())
        ranked = sorted(counts, key=lambda expert: -counts[expert])
        candidates = tuple(
            Candidate(expert, counts[expert] / total if total else 0.0, 0.5, None, float(counts[expert]))
            for expert in ranked
        )
        chosen = tuple(expert for expert in candidates if expert.weight)[: options.top_m]
        return Decision(
            strategy=options.strategy or "hybrid",
            policy=options.policy or "proportional",
            temperature=options.temperature or 1.0,
            threshold=options.threshold or 0.5,
            candidates=candidates,
            experts=chosen,
            fallback=not chosen,
            reason=f"{len(chosen)} experts are named in the text",
            truncated=len(text) > self.truncate_after,
            margin=candidates[0].score - candidates[1].score,
            entropy=1.0,
        )

    @property
    def projection(self) -> Projection:
        return Projection.of(np.eye(len(self.experts), dtype=np.float32))

    async def close(self) -> None:
        pass


def saying(tokenizer: Any, text: str) -> Script:
    """A script that says `text`, whatever is asked."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return lambda _: ids


def seeded(tokenizer: Any, length: int = 12) -> Script:
    """A script of random letters that the sequence's seed decides; other seeds, other letters."""
    letters = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "abcdefghij"]

    def script(work: Work) -> list[int]:
        chooser = random.Random(work.sampling.seed)
        return [chooser.choice(letters) for _ in range(length)]

    return script
