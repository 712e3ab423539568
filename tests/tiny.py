"""Tiny random models and adapters, and a running engine over them."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from loramux.adapters.arena import Arena
from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.blend import Blend
from loramux.adapters.layers import AdapterLayers
from loramux.adapters.lora import LoraAdapter, LoraPair
from loramux.adapters.residency import Residency
from loramux.kernels.gated_lora import Form
from loramux.server.engine.grammars import Grammars
from loramux.server.engine.local import EngineLimits, LocalEngine
from loramux.server.engine.protocol import Event, Finished, Sampling, Token, TokenScore, Work
from loramux.server.engine.sampler import Sampler, adjust_
from loramux.server.engine.sequence import Sequence as EngineSequence

VOCABULARY = 300
#: What a config of most families takes.
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 3, "vocab_size": VOCABULARY, "max_position_embeddings": 256,
    "initializer_range": 0.15, "pad_token_id": 0,
}  # fmt: skip


def tiny_llama(**overrides: Any) -> LlamaForCausalLM:
    """A random two-layer Llama in float32 with logits spread enough for greedy decoding to be decisive."""
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 112,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.15,
            **overrides,
        }
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def random_adapter(shapes: BaseShapes, rank: int, name: str, size: float = 0.15) -> LoraAdapter:
    """An adapter on every module whose deltas change what a tiny model says."""
    pairs = {
        module: LoraPair(torch.randn(rank, n_in) * size, torch.randn(n_out, rank) * size, 0.5)
        for module, (n_out, n_in) in shapes.modules.items()
    }
    return LoraAdapter(name, f"hash of {name} {torch.randint(2**31, ()).item()}", pairs)


def random_experts(model: torch.nn.Module, ranks: Sequence[int]) -> list[LoraAdapter]:
    """One for each rank, named a, b, c and so on."""
    shapes = BaseShapes.from_model(model, "tiny")
    return [random_adapter(shapes, rank, name) for rank, name in zip(ranks, "abcdefgh", strict=False)]


def random_prompt(length: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, VOCABULARY, (length,)).tolist())


def with_delta(model: PreTrainedModel, parts: Sequence[tuple[LoraAdapter, float]]) -> PreTrainedModel:
    """A copy of the model with the float64 sum of the weighted deltas added into its weights."""
    merged = type(model)(model.config).eval().requires_grad_(False)
    merged.load_state_dict(model.state_dict())
    for path, module in merged.named_modules():
        deltas = [w * adapter.delta(path) for adapter, w in parts if path in adapter.pairs]
        if deltas:
            module.weight.data = (module.weight.double() + sum(deltas)).to(module.weight.dtype)
    return merged


def greedy(model: PreTrainedModel, prompt: Sequence[int], tokens: int) -> list[int]:
    """What transformers' own generate says."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return list(out[0, len(prompt) :].tolist())


@dataclass
class Answer:
    events: list[Event] = field(default_factory=list)

    @property
    def scores(self) -> list[TokenScore]:
        return [event.score for event in self.events if isinstance(event, Token)]

    @property
    def tokens(self) -> list[int]:
        return [score.id for score in self.scores]

    @property
    def finished(self) -> Finished:
        last = self.events[-1]
        assert isinstance(last, Finished)
        return last


def same_tokens(answers: Sequence[Answer], alone: Sequence[Answer], tie: float = 1e-4) -> None:
    """Assert that greedy answers are those of sequences that ran alone with `logprobs=2`, up to where the two
    best tokens of one alone are nearer than `tie` (natural log): the last bits of a float32 sum, whose order
    depends on the number of rows, may decide between those."""
    for number, (answer, expected) in enumerate(zip(answers, alone, strict=True)):
        for place, (token, score) in enumerate(zip(answer.tokens, expected.scores, strict=True)):
            if token != score.id:
                (_, best), (second, next_best) = score.top
                assert token == second, f"answer {number}, token {place}"
                assert best - next_best < tie, f"answer {number}, token {place}"
                break


class Rig:
    """A started engine with its residency."""

    def __init__(self, engine: LocalEngine, residency: Residency) -> None:
        self.engine = engine
        self.residency = residency
        self._ids = count()

    def blend(self, weights: Mapping[str, float], method: str = "exact") -> Blend:
        experts = self.residency.experts
        return Blend.of(
            [(name, experts[name].content_hash, weight) for name, weight in weights.items()], method=method
        )

    async def events(
        self,
        prompt: Sequence[int],
        weights: Mapping[str, float] | None = None,
        *,
        prompt_logprobs: int | None = None,
        method: str = "exact",
        grammar: str | None = None,
        **sampling: Any,
    ) -> AsyncIterator[Event]:
        async with self.residency.lease(self.blend(weights or {}, method)) as lease:
            chosen = Sampling(**{"max_tokens": 24, "temperature": 0.0, **sampling})
            work = Work(f"w{next(self._ids)}", tuple(prompt), chosen, lease.handle, prompt_logprobs, grammar)
            async with aclosing(self.engine.run(work)) as events:
                async for event in events:
                    yield event

    async def ask(
        self, prompt: Sequence[int], weights: Mapping[str, float] | None = None, **options: Any
    ) -> Answer:
        return Answer([event async for event in self.events(prompt, weights, **options)])


@asynccontextmanager
async def running(
    model: PreTrainedModel,
    experts: Sequence[LoraAdapter] = (),
    *,
    rows: int = 256,
    eos_ids: Sequence[int] = (),
    form: Form | None = None,
    grammars: Grammars | None = None,
    **limits: Any,
) -> AsyncIterator[Rig]:
    """An engine over `model`, which is changed by it; stopped, and its rows recounted, at the end."""
    shapes = BaseShapes.from_model(model, "tiny")
    arena = Arena(shapes, rows, dtype=model.dtype, device=model.device)
    layers = AdapterLayers(model, arena, form)
    residency = Residency({expert.id: expert for expert in experts}, arena)
    chosen = EngineLimits(**{"kv_tokens": 4096, "page_size": 8, "max_batch_tokens": 64, **limits})
    engine = LocalEngine(model, layers, eos_ids=eos_ids, limits=chosen, grammars=grammars)
    await engine.start()
    try:
        yield Rig(engine, residency)
    finally:
        await engine.stop(5)
        residency.check_integrity()


# No events are delivered here.
NOWHERE = asyncio.new_event_loop()
NOWHERE.close()


def sequence(sampling: Sampling, prompt: tuple[int, ...] = (1,)) -> EngineSequence:
    return EngineSequence(Work("w", prompt, sampling), frozenset(), NOWHERE)


class Alone:
    """One sequence, whose tokens are chosen alone."""

    def __init__(self, sampling: Sampling, prompt: tuple[int, ...] = (1,)) -> None:
        self.sequence = sequence(sampling, prompt)
        self.sampler = Sampler()

    def sample(self, logits: torch.Tensor) -> TokenScore:
        [score] = self.sampler.choose(logits.unsqueeze(0), [self.sequence])
        assert score is not None
        return score

    def accept(self, token: int) -> None:
        self.sequence.accept(TokenScore(token))

    def adjusted(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        adjust_(logits, self.sequence)
        return logits
