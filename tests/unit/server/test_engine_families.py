"""Model families against transformers' own generate: tokens and log-probabilities, alone and batched, bare
and with blends. What the engine does not serve is refused at the start, by the name of the feature."""

import asyncio
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from loramux.server.engine.model import BaseModelError
from loramux.server.engine.protocol import EngineError
from tests.tiny import VOCABULARY, Answer, greedy, random_experts, random_prompt, running, with_delta

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "pad_token_id": 0,
}
ROPE = {"rope_theta": 10000.0}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}

#: name -> (class of the config, what differs from `COMMON`; `None` leaves an argument out)
SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, linear": ("Llama", {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 2.0}}),
    "llama, dynamic": ("Llama", {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}}),
    "llama, yarn": (
        "Llama",
        {
            "rope_parameters": {
                **ROPE,
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama, llama3": (
        "Llama",
        {
            "rope_parameters": {
                **ROPE,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 16, "head_dim": 16}),
    "ministral": ("Ministral", {"sliding_window": 16, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-moe": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16},
    ),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3Text", {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", {"sliding_window": 16}),
    "granite": ("Granite", {}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {"sliding_window": 16}),
    "smollm3": ("SmolLM3", {}),
    "cohere": ("Cohere", {}),
    "cohere2": ("Cohere2", {"sliding_window": 16}),
    "starcoder2": ("Starcoder2", {"sliding_window": 16}),
    "gpt-neox": ("GPTNeoX", {"num_key_value_heads": None}),
    "opt": (
        "OPT",
        {
            "intermediate_size": None,
            "num_key_value_heads": None,
            "initializer_range": None,
            "ffn_dim": 112,
            "word_embed_proj_dim": 64,
            "init_std": 0.15,
        },
    ),
    "mixtral": ("Mixtral", MOE),
    "gpt-oss": ("GptOss", {**MOE, "head_dim": 16, "sliding_window": 16}),
    "stablelm": ("StableLm", {}),
    "nemotron": ("Nemotron", {}),
    "deepseek-v3": (
        "DeepseekV3",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
        },
    ),
}
LONGROPE = {
    **ROPE,
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 64,
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "falcon, alibi": ("Falcon", {"alibi": True}, "0 attend through transformers' AttentionInterface"),
    "falcon-h1": ("FalconH1", {}, "recurrent layers"),
    "llama4": (
        "Llama4Text",
        {"num_local_experts": 2, "head_dim": 16, "intermediate_size_mlp": 112, "attention_chunk_size": 16},
        "chunked_attention",
    ),
    "bloom": ("Bloom", {"max_position_embeddings": None}, "ALiBi"),
}


def make(name: str, options: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    given = {key: value for key, value in {**COMMON, **options}.items() if value is not None}
    config = getattr(transformers, f"{name}Config")(**given)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.float().eval().requires_grad_(False)


def generated(model: PreTrainedModel, prompt: tuple[int, ...], tokens: int) -> tuple[list[int], list[float]]:
    """Tokens of `generate` and their log-probabilities."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=None,
        pad_token_id=0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    chosen = out.sequences[0, len(prompt) :].tolist()
    scores = [
        float(logits[0].log_softmax(-1)[token]) for logits, token in zip(out.logits, chosen, strict=True)
    ]
    return chosen, scores


@pytest.mark.parametrize("family", SERVED)
def test_a_family_says_what_generate_says(family: str) -> None:
    model = make(*SERVED[family])
    experts = random_experts(model, (4, 4))
    prompts = [random_prompt(length) for length in (4, 30, 100)]
    expected = [generated(model, prompt, 16) for prompt in prompts]
    summed = with_delta(model, [(experts[0], 0.5), (experts[1], 0.5)])
    summed.generation_config = model.generation_config
    blended = [greedy(summed, prompt, 12) for prompt in prompts]

    async def scenario() -> tuple[list[Answer], list[Answer], list[Answer]]:
        async with running(model, experts, rows=64) as rig:
            options = {"logprobs": 0, "max_tokens": 16}
            alone = [await rig.ask(prompt, **options) for prompt in prompts]
            together = await asyncio.gather(*(rig.ask(prompt, **options) for prompt in prompts))
            blend = {"a": 0.5, "b": 0.5}
            mixed = await asyncio.gather(*(rig.ask(prompt, blend, max_tokens=12) for prompt in prompts))
            return alone, together, mixed

    alone, together, mixed = asyncio.run(scenario())
    for answers in (alone, together):
        assert [answer.tokens for answer in answers] == [tokens for tokens, _ in expected]
        for answer, (_, scores) in zip(answers, expected, strict=True):
            assert [score.logprob for score in answer.scores] == pytest.approx(scores, abs=8e-6)
    assert [answer.tokens for answer in mixed] == blended


@pytest.mark.parametrize("family", REFUSED)
def test_what_is_not_served_is_refused_at_the_start(family: str) -> None:
    name, options, reason = REFUSED[family]
    model = make(name, options)

    async def scenario() -> None:
        async with running(model):
            raise AssertionError("it started")

    with pytest.raises((EngineError, BaseModelError), match=reason):
        asyncio.run(scenario())


def test_longrope_is_served_up_to_where_its_factors_change() -> None:
    model = make("Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64})
    prompts = [random_prompt(length) for length in (4, 30, 48)]
    expected = [generated(model, prompt, 16)[0] for prompt in prompts]

    async def scenario() -> list[list[int]]:
        async with running(model) as rig:
            assert rig.engine.max_context == 64
            with pytest.raises(EngineError, match="context of 64"):
                await rig.ask(random_prompt(60), max_tokens=5)
            return [a.tokens for a in await asyncio.gather(*(rig.ask(p, max_tokens=16) for p in prompts))]

    assert asyncio.run(scenario()) == expected
