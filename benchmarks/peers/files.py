"""The model files that loramux and its peers are compared on, and the prompts.

One folder, a loramux pool, serves everybody: `pool/base` is an ordinary Hugging Face directory (a Llama of 24
layers, hidden size 1024, 317 million parameters, random weights, in float32 or bfloat16), and
`pool/experts/e0` to `e7` are adapters written by PEFT (rank 16, all seven projections, random). Its router is
fitted on made-up texts and never asked: every request names its mixture. 1.6 GB in float32; the same seed
writes the same numbers.
"""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

EXPERTS = tuple(f"e{number}" for number in range(8))
BASE_ID = "bench-base"
RANK = 16
SEED = 20
PROMPT_TOKENS = 32
CONTEXT = 2048
SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DEFAULT_CACHE = Path(os.environ.get("LORAMUX_BENCH") or "~/.cache/loramux-bench").expanduser()


@dataclass(frozen=True)
class Files:
    """Where everything is."""

    pool: Path

    @property
    def weight_bytes(self) -> int:
        """Of the base and all adapters, in float32."""
        return sum(file.stat().st_size for file in self.pool.rglob("*.safetensors"))

    @property
    def base(self) -> Path:
        return self.pool / "base"

    @property
    def adapters(self) -> dict[str, Path]:
        return {name: self.pool / "experts" / name for name in EXPERTS}

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self.base / "tokenizer.json"))


@dataclass(frozen=True)
class Prompt:
    """A text and its ids, the first of which is the tokenizer's `<|bos|>`."""

    text: str
    ids: list[int]


def plain_tokens(tokenizer: Tokenizer) -> list[int]:
    """Tokens that are printable ASCII: texts of their own, wherever they stand."""
    special = set(tokenizer.get_added_tokens_decoder())
    texts = {token: tokenizer.decode([token]) for token in range(tokenizer.get_vocab_size())}
    return [
        t for t, text in texts.items() if t not in special and text and text.isascii() and text.isprintable()
    ]


def prompts(tokenizer: Tokenizer, count: int, seed: str) -> list[Prompt]:
    """Distinct prompts of `PROMPT_TOKENS` tokens; other seeds give others, so that no prefix cache helps."""
    generator = random.Random(seed)
    words = [token for token in plain_tokens(tokenizer) if tokenizer.decode([token])[0] == " "]
    found: list[Prompt] = []
    while len(found) < count:
        text = tokenizer.decode(generator.sample(words, PROMPT_TOKENS)).strip()
        ids = tokenizer.encode(text).ids[:PROMPT_TOKENS]
        text = tokenizer.decode(ids[1:])
        if len(ids) == PROMPT_TOKENS and tokenizer.encode(text).ids == ids:
            found.append(Prompt(text, ids))
    return found


def make(cache: Path, layers: int, *, narrow: bool = False) -> Files:
    """Write the files where they are missing, `narrow` in bfloat16. 24 layers take half a minute."""
    pool = cache / f"pool-{layers}{'-bfloat16' if narrow else ''}"
    if not (pool / "pool.json").is_file():
        partial = cache / f"{pool.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "base").mkdir(parents=True)
        _write_tokenizer(partial / "base")
        _write_models(partial, layers, narrow)
        _write_pool(partial)
        shutil.rmtree(pool, ignore_errors=True)
        partial.rename(pool)
    return Files(pool)


def _write_tokenizer(base: Path) -> None:
    from tests.kit import DEMO_POOL

    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(DEMO_POOL / "base" / name, base / name)


def _write_models(pool: Path, layers: int, narrow: bool) -> None:
    """The base and, through PEFT, its adapters.

    Rows of the tied embedding that are no printable text are zero. A zero row scores 0 and some other row
    scores more, so greedy answers hold no special token, none ends early on any server, and every token is a
    piece of text that can be streamed at once.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = Tokenizer.from_file(str(pool / "base" / "tokenizer.json"))
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        bos_token_id=0,
        eos_token_id=4,
        pad_token_id=5,
        num_hidden_layers=layers,
        **SHAPE,
    )
    model = LlamaForCausalLM(config).requires_grad_(False)
    plain = torch.zeros(config.vocab_size, 1)
    plain[plain_tokens(tokenizer)] = 1
    model.model.embed_tokens.weight.mul_(plain)
    model.to(torch.bfloat16 if narrow else torch.float32)
    generation = (pool / "base" / "generation_config.json").read_bytes()
    model.save_pretrained(pool / "base")
    (pool / "base" / "generation_config.json").write_bytes(generation)
    # PEFT leaves B random instead of zero, or every adapter would do nothing.
    lora = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=PROJECTIONS, task_type="CAUSAL_LM", init_lora_weights=False
    )
    first, *others = EXPERTS
    adapted = get_peft_model(model, lora, adapter_name=first)
    for name in others:
        adapted.add_adapter(name, lora)
    for settings in adapted.peft_config.values():
        settings.base_model_name_or_path = BASE_ID
    adapted.to(torch.bfloat16 if narrow else torch.float32)
    adapted.save_pretrained(pool / "experts", save_embedding_layers=False)


def _write_pool(root: Path) -> None:
    import numpy as np

    from loramux.router.fit.router import fit_router
    from loramux.router.store import load_router, save_router
    from loramux.server.pool.manifest import (
        BaseEntry,
        ExpertEntry,
        Manifest,
        RouterEntry,
        hash_files,
        write_manifest,
    )
    from tests.kit import DEMO_POOL

    (root / "experts" / "README.md").unlink(missing_ok=True)
    shutil.copytree(DEMO_POOL / "router" / "encoder", root / "router" / "encoder")
    encoder = load_router(DEMO_POOL / "router").encoder
    texts = [_text(name, number) for name in EXPERTS for number in range(8)]
    labels = np.repeat(np.arange(len(EXPERTS)), 8)
    state = fit_router(encoder.encode(texts).vectors, labels, EXPERTS, encoder.spec)
    save_router(state, root / "router")
    manifest = Manifest(
        format="loramux-pool",
        version=1,
        name="bench",
        base=BaseEntry(BASE_ID, "base"),
        experts=tuple(ExpertEntry(id=name, path=f"experts/{name}", rows=8) for name in EXPERTS),
        router=RouterEntry("router"),
        sparse=(),
        files=hash_files(root),
    )
    write_manifest(root, manifest)


def _text(name: str, number: int) -> str:
    generator = random.Random(f"{name} {number % 2}")
    return " ".join(["".join(generator.sample("abcdefghijklmnopqrstuvwxyz", 5)) for _ in range(6)])
