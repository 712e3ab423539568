"""All layers of a decode step in one call say what they say one by one; other layers are left alone."""

import asyncio
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from loramux.kernels import decoder_stack
from loramux.kernels.packed_linear import Kind, Kinds, StoredLinear, unpack
from loramux.server.engine.runner import Runner
from loramux.server.engine.stack import DecodeStack
from loramux.server.engine.weights import prepare
from tests.tiny import SIZES, Answer, random_experts, random_prompt, running

pytestmark = pytest.mark.skipif(decoder_stack.library() is None, reason="installed without a C++ compiler")

#: Family, what else its config needs.
FIT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "mistral": ("Mistral", {"sliding_window": 16, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
}
UNFIT: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {"head_dim": 16}),  # norms of queries and keys
    "granite": ("Granite", {"residual_multiplier": 0.5, "attention_multiplier": 0.25}),
    "gemma": ("Gemma", {"head_dim": 16}),  # another activation, scaled embeddings
    "phi3": ("Phi3", {}),  # one matrix for q, k and v
    "llama, rows of no whole block": ("Llama", {"intermediate_size": 100}),
}
#: Two kinds a model, so that neighbouring calls are of different ones.
KINDS = {
    "bf16": Kinds(Kind.BF16, Kind.BF16),
    "int8": Kinds(Kind.INT8, Kind.INT8),
    "q4_1": Kinds(Kind.Q4_1, Kind.Q8_0),
}
MIXTURES: list[dict[str, float]] = [{}, {"a": 1.0}, {"b": 0.7, "c": 0.3}, {"c": -0.6, "a": 1.4}]


def stored(name: str, fields: dict[str, Any], kinds: Kinds) -> PreTrainedModel:
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **fields})
    model: Any = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms of ones and biases of zeros would hide what is done with them
            parameter.copy_(parameter + 0.1 * torch.randn_like(parameter))
    prepare(model, torch.device("cpu"), torch.float32, kinds)
    found: PreTrainedModel = model
    return found


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each step had that the stack computed."""
    steps: list[int] = []
    hidden = DecodeStack.hidden

    def counted(self: DecodeStack, inputs: Any, rows: Any) -> torch.Tensor:
        steps.append(rows.lengths.shape[0])
        return hidden(self, inputs, rows)

    monkeypatch.setattr(DecodeStack, "hidden", counted)
    return steps


async def answers(model: PreTrainedModel) -> list[Answer]:
    """Alone and together, bare and with blends, greedily, with the log-probability of every token."""
    jobs = [(random_prompt(3 + 9 * n), MIXTURES[n % 4]) for n in range(6)]
    async with running(model, random_experts(model, (4, 8, 3))) as rig:
        alone = [await rig.ask(*job, max_tokens=9, logprobs=0) for job in jobs[:4]]
        return alone + await asyncio.gather(*(rig.ask(*job, max_tokens=9, logprobs=0) for job in jobs))


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("family", FIT)
def test_a_stack_says_what_its_layers_say(
    family: str, kinds: str, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stored(*FIT[family], KINDS[kinds])
    torch.manual_seed(5)
    found = asyncio.run(answers(model))
    assert len(computed) > 40
    assert max(computed) >= 3
    computed.clear()
    monkeypatch.setattr(Runner, "_find_stack", lambda _: None)
    torch.manual_seed(5)
    expected = asyncio.run(answers(model))
    assert not computed
    for number, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert mine.tokens == theirs.tokens
        # To the last bit; together, experts lie in the arena in the order in which they came.
        off = 0 if number < 4 else 1e-5
        wanted = [score.logprob for score in theirs.scores]
        assert [score.logprob for score in mine.scores] == pytest.approx(wanted, abs=off, rel=0)


def test_a_stack_says_what_float64_says(computed: list[int]) -> None:
    model = stored(*FIT["llama, biases"], KINDS["q4_1"])
    plain: Any = type(model)(model.config).eval().double()
    state = {
        name: value
        for name, value in model.state_dict().items()
        if not name.endswith((".data", "row_scales"))
    }
    for name, module in model.named_modules():
        if hasattr(module, "packed"):
            state[f"{name}.weight"] = unpack(module.packed)
        if isinstance(module, StoredLinear) and module.bias is not None:
            state[f"{name}.bias"] = module.bias
    plain.load_state_dict(state)
    prompt = random_prompt(20)

    async def scenario() -> Answer:
        async with running(model, random_experts(model, (2,))) as rig:
            return await rig.ask(prompt, max_tokens=30, logprobs=0)

    answer = asyncio.run(scenario())
    assert len(computed) >= 29
    ids = torch.tensor([[*prompt, *answer.tokens]])
    logits = plain(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    wanted = logits.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0].tolist()
    assert [score.logprob for score in answer.scores] == pytest.approx(wanted, abs=2e-5)


@pytest.mark.parametrize("family", UNFIT)
def test_what_is_no_such_stack_is_called_layer_by_layer(family: str, computed: list[int]) -> None:
    model = stored(*UNFIT[family], KINDS["bf16"])

    async def scenario() -> Answer:
        async with running(model, random_experts(model, (2,))) as rig:
            return await rig.ask(random_prompt(5), max_tokens=4)

    assert len(asyncio.run(scenario()).tokens) == 4
    assert len(computed) <= 1  # the trial, where the parts are there and do something else
