"""Every kind of LoRA that is served, loaded at run time and judged by log-probabilities over HTTP."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loramux.server.pool.manifest import read_pool
from tests.e2e.conftest import Server, serving
from tests.peft_kit import change_config, save_peft, weighted_sum

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning", "ignore:.*did not match any:RuntimeWarning"
)

KEY = "key-of-the-operator"
TEXT = "Find all files under /etc that were changed today, newest first."
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-1": {"r": 1, "lora_alpha": 1},
    "rslora": {"use_rslora": True, "r": 9, "lora_alpha": 5},
    "rank-pattern": {"rank_pattern": {"q_proj": 7, "down_proj": 2}},
    "alpha-pattern": {"alpha_pattern": {r"layers\.1\..*_proj": 11, "up_proj": 3}},
    "patterns-rslora": {
        "rank_pattern": {"(q|k)_proj": 3},
        "alpha_pattern": {"(up|gate)_proj": 1, "v_proj": 8},
        "use_rslora": True,
    },
    "two-targets": {"target_modules": ["q_proj", "down_proj"]},
    "one-layer": {"layers_to_transform": [1]},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def deltas(root: Path, pool_dir: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Adapters saved by PEFT, and what PEFT's own factors and scaling say they add, in float64."""
    made = {}
    for name, fields in CONFIGS.items():
        model = AutoModelForCausalLM.from_pretrained(pool_dir / "base", dtype=torch.float32)
        made[name] = save_peft(root / name, model, **fields)
        change_config(root / name, base_model_name_or_path=read_pool(pool_dir).manifest.base.id)
    return made


@pytest.fixture(scope="module")
def admin(root: Path, deltas: dict[str, Any]) -> Iterator[Server]:
    with serving("--set", f"admin_key={KEY}", "--set", f"adapter_root={root}") as server:
        for name in deltas:
            answer = httpx.post(
                f"{server.url}/v1/load_lora_adapter",
                json={"lora_name": name, "lora_path": name},
                headers={"authorization": f"Bearer {KEY}"},
                timeout=60,
            )
            assert answer.status_code == 200, answer.text
        yield server


@pytest.fixture(scope="module")
def base(pool_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(pool_dir / "base", dtype=torch.float64).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_mixture_with_each_kind_of_lora_is_the_float64_sum(
    admin: Server, deltas: dict[str, Any], base: Any, pool_dir: Path, name: str
) -> None:
    other = "plain" if name != "plain" else "rslora"
    mixture = {name: 0.15, other: -0.1}
    tokenizer = AutoTokenizer.from_pretrained(pool_dir / "base")
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    original = {path: tensor.clone() for path, tensor in base.state_dict().items()}
    for path, delta in weighted_sum([(deltas[n], w) for n, w in mixture.items()]).items():
        base.get_submodule(path).weight.data += delta
    with torch.no_grad():
        logprobs = base(ids).logits[0].log_softmax(-1)
        bare = float(logprobs.sum())
    base.load_state_dict(original)
    with torch.no_grad():
        assert abs(float(base(ids).logits[0].log_softmax(-1).sum()) - bare) > 1
    expected = [float(logprobs[i, token]) for i, token in enumerate(ids[0, 1:])]

    answer = admin.post(
        "/v1/completions",
        model="auto",
        prompt=TEXT,
        echo=True,
        logprobs=0,
        max_tokens=0,
        lora=[{"id": n, "scale": w} for n, w in mixture.items()],
    )
    assert answer["choices"][0]["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=5e-4)
