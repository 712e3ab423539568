"""A model of a real size of vocabulary and context, in a pool as users have them, with default settings."""

import shutil
from pathlib import Path

import httpx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from loramux.router.encoder import Encoder
from loramux.router.fit.router import fit_router
from loramux.router.store import save_router
from loramux.server.pool.manifest import (
    BaseEntry,
    ExpertEntry,
    Manifest,
    RouterEntry,
    hash_files,
    write_manifest,
)
from tests.e2e.conftest import serving

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

TEXTS = {
    "sql": ["How many wins does {} have?", "What is the total score of {}?", "Which team of {} won in 1998?"],
    "shell": ["Find all files named {} in /var", "Delete every {} directory", "Count the lines of {} files"],
    "medical": ["What are the symptoms of {}?", "How is {} treated?", "Is {} inherited by children?"],
}
NAMES = ["ferrari", "arsenal", "anemia", "readme", "backup", "asthma", "boston", "tmp", "gout", "leeds"]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, pool_dir: Path) -> Path:
    root = tmp_path_factory.mktemp("real") / "pool"
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49_152,
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            eos_token_id=0,
        )
    ).eval()
    model.save_pretrained(root / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(pool_dir / "base" / name, root / "base" / name)
    for name in TEXTS:
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(LlamaForCausalLM(model.config), config).save_pretrained(root / "experts" / name)
    shutil.copytree(pool_dir / "router" / "encoder", root / "router" / "encoder")
    encoder = Encoder.load(root / "router" / "encoder")
    rows = [
        (number, form.format(name))
        for number, forms in enumerate(TEXTS.values())
        for form in forms
        for name in NAMES
    ]
    vectors = encoder.encode([text for _, text in rows]).vectors
    labels = torch.tensor([number for number, _ in rows]).numpy()
    save_router(fit_router(vectors, labels, list(TEXTS), encoder.spec), root / "router")
    experts = tuple(
        ExpertEntry(id=name, path=f"experts/{name}", description="", rows=30, any_base=True) for name in TEXTS
    )
    entry = BaseEntry(id="real", path="base")
    write_manifest(
        root,
        Manifest(
            format="loramux-pool", version=1, name="real", base=entry, experts=experts,
            router=RouterEntry(path="router"), sparse=(), files=hash_files(root),
        ),
    )  # fmt: skip
    return root


def test_it_once_died_before_the_first_request_and_said_it_was_ready(pool: Path) -> None:
    with serving("--pool", str(pool)) as server:
        assert httpx.get(f"{server.url}/ready").status_code == 200
        for content in ("Find all files named boston in /var", "What are the symptoms of gout?"):
            answer = server.post(
                "/v1/chat/completions",
                model="auto",
                max_tokens=8,
                messages=[{"role": "user", "content": content}],
            )
            assert answer["usage"]["completion_tokens"] > 0
            assert not answer["loramux"]["route"]["fallback"]
        long = "count the lines of main files " * 600
        answer = server.post("/v1/completions", model="real", prompt=long, max_tokens=4)
        assert answer["usage"]["prompt_tokens"] > 3000
