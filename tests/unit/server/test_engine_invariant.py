"""With `engine.batch_invariant` what a token gets depends on the tokens before it alone, bit by bit."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from loramux.adapters.arena import Arena
from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.blend import Blend
from loramux.adapters.layers import AdapterLayers
from loramux.adapters.sparse.token_mixtures import TokenMethod, TokenMixture
from loramux.server.build import build_core
from loramux.server.core import Core
from loramux.server.engine.local import EngineLimits, LocalEngine
from loramux.server.engine.protocol import EngineError, Sampling, Work
from loramux.server.engine.runner import Runner
from loramux.server.engine.scheduler import Chunk
from loramux.server.engine.sequence import Sequence
from loramux.server.engine.weights import FULL, is_compiled, prepare
from loramux.server.errors import StartError
from loramux.server.memory.blueprint import Blueprint
from loramux.server.pool.routing import open_pool
from loramux.server.settings import Settings
from tests.tiny import NOWHERE, SIZES, Answer, random_prompt, running
from tests.tiny import random_experts as some_experts
from tests.tiny_sparse import random_experts

pytestmark = pytest.mark.skipif(not is_compiled(), reason="installed without a C++ compiler")

POOL = Path(__file__).parents[2] / "demo_pool"
PAGE, PAGES = 8, 12


@contextmanager
def threads(count: int) -> Iterator[None]:
    usual = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


class Rig:
    """A runner, and sequences whose tokens are all known: every position's logits are asked for."""

    def __init__(self, model: PreTrainedModel, layers: AdapterLayers, *, sequences: int = 8) -> None:
        self.runner = Runner(
            model,
            layers,
            pages=PAGES * sequences,
            page_size=PAGE,
            max_tokens=PAGE * PAGES * sequences,
            max_running=sequences,
            max_context=PAGE * PAGES,
            graphs=False,
            invariant=True,
        )
        self.runner.start()
        self._vocabulary = model.config.vocab_size

    def sequence(self, number: int, handle: Any = None) -> Sequence:
        length = random.randrange(2, PAGE * PAGES)
        work = Work(
            f"{number}", tuple(self._tokens(length)), Sampling(max_tokens=1), handle, prompt_logprobs=0
        )
        made = Sequence(work, frozenset(), NOWHERE)
        made.pages = random.sample(range(PAGES * number, PAGES * (number + 1)), PAGES)
        return made

    def _tokens(self, count: int) -> list[int]:
        return torch.randint(self._vocabulary, (count,)).tolist()

    def logits(self, sequences: Items[Sequence], length: Callable[[], int]) -> list[Tensor]:
        """Of every position of each, computed in pieces of random sizes, beside whichever others."""
        found: list[list[Tensor]] = [[] for _ in sequences]
        done = [0] * len(sequences)
        while left := [i for i, one in enumerate(sequences) if done[i] < len(one.tokens)]:
            some = random.sample(left, random.randint(1, len(left)))
            sizes = {i: min(length(), len(sequences[i].tokens) - done[i]) for i in some}
            some.sort(key=lambda i: sizes[i] > 1)
            step = self.runner.run([Chunk(sequences[i], done[i], sizes[i]) for i in some], lambda: None)
            for i, rows in zip(some, step.rows, strict=True):
                found[i].append(step.values[rows].clone())
                done[i] += sizes[i]
        return [torch.cat(parts) for parts in found]

    def check(self, sequences: Items[Sequence]) -> None:
        """Alone and token by token, on one thread, is what all is compared with."""
        with threads(1):
            alone = [self.logits([one], lambda: 1)[0] for one in sequences]
        for count in (1, 2):
            with threads(count):
                for sizes in ((1,), (1, 2, 7, 16, 64), (100,)):
                    together = self.logits(sequences, lambda sizes=sizes: random.choice(sizes))
                    for found, wanted in zip(together, alone, strict=True):
                        assert torch.equal(found, wanted)


@pytest.fixture(autouse=True)
def _chosen(seed: int) -> None:
    random.seed(seed)


def core(**settings: Any) -> Core:
    """The demo pool's; its base is stored in bfloat16."""
    chosen = Settings(
        pool=POOL,
        device="cpu",
        verify_pool=False,
        engine={"batch_invariant": True, "kv_tokens": 4096},
        **settings,
    )
    return build_core(chosen, open_pool(chosen))


@asynccontextmanager
async def everything(made: Core) -> AsyncIterator[list[Any]]:
    """A handle of each kind that a request may have."""
    experts = list(made.residency.experts.values())
    shapes = BaseShapes.from_model(made.engine._model, made.base)

    def blend(count: int, method: str = "exact") -> Blend:
        some = random.sample(experts, count)
        return Blend.of([(e.id, e.content_hash, random.uniform(-1, 1)) for e in some], method=method)

    for model in (random_experts(shapes, "loramoe"), random_experts(shapes, "mola", top_k=2)):
        await made.shelf.add(model)
    async with AsyncExitStack() as leases:
        held = made.residency, made.shelf, made.mixtures
        wanted = [
            *(held[0].lease(one) for one in (blend(1), blend(3), blend(2), blend(2, "svd"))),
            *(held[1].lease(model_id) for model_id in made.shelf.cards),
            *(held[2].lease(TokenMixture.of(m, experts, top_k=2, temperature=1.0)) for m in TokenMethod),
        ]
        yield [None, *[(await leases.enter_async_context(one)).handle for one in wanted]]


@pytest.mark.parametrize(
    "held", [{"dtype": "float32"}, {}, {"quantization": "int8"}, {"quantization": "int4"}], ids=str
)
def test_every_mixture_is_computed_alike_whatever_runs_beside_it(held: dict[str, str]) -> None:
    async def scenario() -> None:
        made = core(**held)
        async with everything(made) as handles:
            assert len(handles) == 11
            rig = Rig(made.engine._model, made.engine._runner._layers, sequences=len(handles))
            rig.check([rig.sequence(number, handle) for number, handle in enumerate(handles)])

    asyncio.run(scenario())


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, biases, odd sizes": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "intermediate_size": 50},
    ),
    "llama, tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "mistral": ("Mistral", {"sliding_window": 16, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "granite": ("Granite", {"residual_multiplier": 0.5, "attention_multiplier": 0.25}),
    "phi3": ("Phi3", {}),
    "gpt-neox": ("GPTNeoX", {}),
}


def prepared(name: str, fields: dict[str, Any]) -> PreTrainedModel:
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **fields})
    model: PreTrainedModel = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    prepare(model, torch.device("cpu"), torch.float32, FULL, invariant=True)
    return model


def layers_of(model: PreTrainedModel) -> AdapterLayers:
    return AdapterLayers(model, Arena(BaseShapes.from_model(model, "tiny"), 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_families_whose_layers_are_not_one_stack(family: str) -> None:
    model = prepared(*FAMILIES[family])
    rig = Rig(model, layers_of(model))
    rig.check([rig.sequence(number) for number in range(5)])


def test_a_base_with_parts_that_depend_on_the_batch_is_refused() -> None:
    """Torch's own activations compute the last numbers of a tensor in another way, and which those are
    depends on how many tokens there are."""
    model = prepared("Llama", {"hidden_act": "gelu_pytorch_tanh", "intermediate_size": 50})
    limits = EngineLimits(kv_tokens=256, page_size=8, invariant=True)
    engine = LocalEngine(model, layers_of(model), eos_ids=(), limits=limits)
    with pytest.raises(EngineError, match="LlamaForCausalLM computes a token of an answer otherwise"):
        asyncio.run(engine.start())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"dtype": "bfloat16"}, "computes in float32, not in bfloat16"),
        ({"quantization": "nf4"}, "is not for bases in nf4"),
        ({"device": "meta"}, "is for a CPU, not for meta"),
    ],
)
def test_what_it_is_not_for_is_refused(settings: dict[str, str], reason: str) -> None:
    blueprint = Blueprint.read(str(POOL / "base"))
    chosen = {"device": "cpu", "dtype": "auto", "quantization": "none", **settings}
    with pytest.raises(StartError, match=f"^engine.batch_invariant {reason}"):
        blueprint.target(**chosen, invariant=True)


def test_it_needs_the_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramux.server.memory.blueprint.is_compiled", lambda: False)
    with pytest.raises(StartError, match="needs the compiled kernels"):
        Blueprint.read(str(POOL / "base")).target(
            device="cpu", dtype="auto", quantization="auto", invariant=True
        )


def test_an_answer_that_goes_on_elsewhere_is_the_same_to_the_last_bit() -> None:
    """Drawn with a seed, cut at any token, its experts in other rows and others beside it."""
    model = prepared("Llama", {})
    experts = some_experts(model, (4, 8, 3))
    weights, prompt = {"a": 0.7, "b": -0.4, "c": 0.3}, random_prompt(21)
    drawn = {"temperature": 1.0, "seed": 7, "top_p": 0.9, "logprobs": 0, "max_tokens": 24}

    async def whole() -> Answer:
        async with running(model, experts, invariant=True) as rig:
            return await rig.ask(prompt, weights, **drawn)

    async def rest(before: list[int]) -> Answer:
        async with running(model, experts, invariant=True) as rig:
            await rig.ask(random_prompt(9), {"c": 1.0})  # takes the first rows
            others = asyncio.gather(*(rig.ask(random_prompt(30), {"b": 1.0}) for _ in range(4)))
            async with rig.residency.lease(rig.blend(weights)) as lease:
                work = Work("again", prompt, Sampling(**drawn), lease.handle, answered=tuple(before))
                found = Answer([event async for event in rig.engine.run(work)])
            await others
            return found

    expected = asyncio.run(whole())
    for cut in (1, 7, 23):
        assert asyncio.run(rest(expected.tokens[:cut])).scores == expected.scores[cut:]
