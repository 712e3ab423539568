"""Experts in front of fake vLLM servers: the parts behind the engine protocol, without HTTP of ours."""

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.blend import Blend
from loramux.adapters.lora import LoraAdapter
from loramux.adapters.peft_format import write_lora
from loramux.server.backend.connection import Connection
from loramux.server.backend.engine import RemoteEngine
from loramux.server.backend.fleet import Fleet
from loramux.server.backend.folders import PREFIX, BlendFolders
from loramux.server.backend.inspection import SAMPLE, ExpectedBase, inspect_base
from loramux.server.backend.protocol import AdapterBackend
from loramux.server.backend.residency import LoadedBlend, RemoteResidency
from loramux.server.backend.room import Room
from loramux.server.backend.vllm import EndTokens, VllmBackend
from loramux.server.engine.protocol import Sampling, Work
from tests.fake_vllm import FakeVllm, listening
from tests.kit import byte_tokenizer
from tests.tiny import Answer, random_adapter, tiny_llama

BASE = "tiny-base"
RANKS = (1, 8, 16, 32)
TOKENIZER = byte_tokenizer()
#: What most requests say.
PROMPT = (5, 60, 71, 8, 200)
#: Runs a test on the first servers.
Run = Callable[..., None]


def save_base(folder: Path) -> Path:
    """A random base with its tokenizer."""
    tiny_llama(vocab_size=len(TOKENIZER)).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def save_experts(root: Path, base: Path, ranks: Mapping[str, int]) -> dict[str, LoraAdapter]:
    """Random experts, also as directories below `root` that PEFT reads."""
    shapes = BaseShapes.from_config_dir(base, BASE)
    found = {name: random_adapter(shapes, rank, name) for name, rank in ranks.items()}
    for name, adapter in found.items():
        write_lora(adapter, root / name, BASE)
    return found


class Oracle:
    """PEFT's own concatenation of the experts' directories on the base, in float32."""

    def __init__(self, base: Path, experts: Mapping[str, Path]) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        for name, folder in experts.items():
            if isinstance(self._model, PeftModel):
                self._model.load_adapter(str(folder), adapter_name=name)
            else:
                self._model = PeftModel.from_pretrained(self._model, str(folder), adapter_name=name)
        self._model.eval()

    @torch.inference_mode()
    def logprobs(self, weights: Mapping[str, float], tokens: Sequence[int]) -> torch.Tensor:
        """`[tokens, vocabulary]`: of the next token after each."""
        ids = torch.tensor([list(tokens)])
        if not weights:
            with self._model.disable_adapter():
                return torch.log_softmax(self._model(ids).logits[0].float(), dim=-1)
        self._model.add_weighted_adapter(
            list(weights), list(weights.values()), "blend", combination_type="cat"
        )
        self._model.set_adapter("blend")
        try:
            return torch.log_softmax(self._model(ids).logits[0].float(), dim=-1)
        finally:
            self._model.set_adapter(next(iter(weights)))
            self._model.delete_adapter("blend")


@dataclass
class Behind:
    """An engine and a residency over running fakes."""

    fakes: list[FakeVllm]
    experts: dict[str, LoraAdapter]
    residency: RemoteResidency
    engine: RemoteEngine[AdapterBackend]
    fleet: Fleet[AdapterBackend]
    folders: BlendFolders

    def blend(self, method: str = "exact", **weights: float) -> Blend:
        parts = [(name, self.experts[name].content_hash, weight) for name, weight in weights.items()]
        return Blend.of(parts, method=method)

    async def ask(
        self, blend: Blend, prompt: Sequence[int] = (5, 6, 7), tokens: int = 4, **options: Any
    ) -> Answer:
        """The events of one greedy sequence; a random model may well want to end, so it is not asked."""
        wanted = {
            "prompt_logprobs": options.pop("prompt_logprobs", None),
            "grammar": options.pop("grammar", None),
        }
        chosen = {"max_tokens": tokens, "temperature": 0.0, "logprobs": 0, "ignore_eos": True, **options}
        sampling = Sampling(**chosen)
        async with self.residency.lease(blend) as lease:
            work = Work("w", tuple(prompt), sampling, lease.handle, **wanted)
            async with aclosing(self.engine.run(work)) as events:
                return Answer([event async for event in events])


@asynccontextmanager
async def behind(
    place: Path, fakes: Sequence[FakeVllm], urls: Sequence[str], experts: dict[str, LoraAdapter], **room: Any
) -> AsyncIterator[Behind]:
    """Started, and stopped at the end; nothing may be left pinned."""
    chosen = {"ranks": RANKS, "adapters": 4, "nbytes": 2**26, "truncate": True, **room}
    sample = tuple(TOKENIZER(SAMPLE, add_special_tokens=False)["input_ids"])
    expected = ExpectedBase(BASE, frozenset({BASE}), fakes[0].base, sample)
    servers: list[AdapterBackend] = [
        VllmBackend(Connection(url, key=None, seconds=20), EndTokens(frozenset({2}))) for url in urls
    ]
    fleet = Fleet(servers, lambda server: inspect_base(server, expected))
    folders = BlendFolders(place)
    residency = RemoteResidency(experts, fleet, folders, Room(**chosen), base=BASE)
    engine = RemoteEngine(fleet, LoadedBlend, max_context=256, most=64, patience=0.05)
    async with AsyncExitStack() as stack:
        await engine.start()
        stack.push_async_callback(engine.stop, 0)
        stack.callback(folders.close)
        yield Behind(list(fakes), experts, residency, engine, fleet, folders)
    assert residency.stats().pinned_bytes == 0
    assert all(member.running == 0 for member in fleet.members)
    assert engine.stats().running == engine.stats().waiting == 0


@contextmanager
def fakes_of(base: Path, count: int = 1) -> Iterator[tuple[list[FakeVllm], list[str]]]:
    """Fake servers on free ports, and their addresses."""
    made = [FakeVllm(base, name=BASE) for _ in range(count)]
    with ExitStack() as stack:
        yield made, [stack.enter_context(listening(fake)) for fake in made]


def written(found: Behind) -> list[Path]:
    """The directories of blends."""
    return sorted(found.folders.root.glob(f"{PREFIX}*"))


def loaded_at(fake: FakeVllm) -> list[str]:
    """The names that it was asked to load."""
    return [name for action, name in fake.calls if action == "load"]
