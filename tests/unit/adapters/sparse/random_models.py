"""Random bases of every architecture, and random sparse models for them."""

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.lora import LoraPair
from loramux.adapters.sparse.model import (
    ExpertFactors,
    ExpertMixture,
    FfnRouting,
    FfnStrategy,
    Kind,
    MixtureFfn,
    RankMixture,
    SparseModel,
)

BASES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gemma": (GemmaConfig, GemmaForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    "phi": (PhiConfig, PhiForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
}
TOP_K = FfnRouting(FfnStrategy.TOP_K, top_k=2)
SIZE = 0.2


def tiny_base(kind: str) -> PreTrainedModel:
    """A random two-layer model of an architecture, in float32."""
    config, model = BASES[kind]
    sizes = {
        "vocab_size": 120,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if kind == "phi" else 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.15,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": "eager",
    }
    made: PreTrainedModel = model(config(**sizes)).eval().requires_grad_(False)
    for _, parameter in made.named_parameters():
        if parameter.ndim == 1:  # biases and norms that are not what everybody starts from
            parameter.data += torch.randn_like(parameter) * 0.1
    return made


def stack(experts: int, shape: tuple[int, int], rank: int, scale: float = 2.0) -> ExpertFactors:
    n_out, n_in = shape
    return ExpertFactors(
        torch.randn(experts, rank, n_in) * SIZE, torch.randn(experts, n_out, rank) * SIZE, scale
    )


def pair(shape: tuple[int, int], rank: int, scale: float = 1.5) -> LoraPair:
    n_out, n_in = shape
    return LoraPair(torch.randn(rank, n_in) * SIZE, torch.randn(n_out, rank) * SIZE, scale)


def mixlora(
    shapes: BaseShapes,
    routing: FfnRouting = TOP_K,
    *,
    experts: int = 4,
    attention: bool = True,
    rank: int = 4,
    scale: float = 2.0,
) -> SparseModel:
    """Experts on every linear module of every feed-forward block, an ordinary LoRA on attention."""
    blocks: dict[str, dict[str, tuple[int, int]]] = {}
    plain: dict[str, LoraPair] = {}
    for path, shape in shapes.modules.items():
        parent, _, name = path.rpartition(".")
        if parent.endswith(".mlp"):
            blocks.setdefault(parent, {})[name] = shape
        elif attention:
            plain[path] = pair(shape, rank, scale)
    ffn = {}
    for path, projections in blocks.items():
        hidden = projections.get("down_proj", projections.get("fc2", (0, 0)))[0]
        factors = {name: stack(experts, shape, rank, scale) for name, shape in projections.items()}
        ffn[path] = MixtureFfn(torch.randn(experts, hidden) * 0.5, factors, routing)
    return SparseModel("mix", Kind.MIXLORA, "sha256:mix", plain=plain, ffn=ffn)


def loracoe(shapes: BaseShapes, *, experts: int = 2, rank: int = 6) -> SparseModel:
    linear = {
        path: RankMixture(
            torch.randn(rank, n_in) * SIZE,
            torch.randn(n_out, rank) * SIZE,
            2.0,
            torch.randn(experts * rank, n_in) * 0.3,
            experts,
            gain=float(rank),
        )
        for path, (n_out, n_in) in shapes.modules.items()
    }
    return SparseModel("coe", Kind.LORACOE, "sha256:coe", linear=linear)


def loramoe(shapes: BaseShapes, top_k: int | None = None, *, experts: int = 4, rank: int = 3) -> SparseModel:
    linear = {
        path: ExpertMixture(stack(experts, shape, rank), torch.randn(experts, shape[1]) * 0.3, top_k)
        for path, shape in shapes.modules.items()
    }
    kind = Kind.LORAMOE if top_k is None else Kind.MOLA
    return SparseModel("moe", kind, "sha256:moe", linear=linear)
