"""An adapter that the pool has never seen, loaded into the real server with example texts."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from tests.e2e.conftest import Server, serving

ADMIN = {"authorization": "Bearer admin"}
EXAMPLES = [
    "Write a poem about the autumn rain",
    "Compose a short poem on the lonely sea",
    "A haiku about cherry blossoms, please",
    "Write a sonnet for my love, with rhymes",
    "Give me four lines of verse about winter stars",
]
POEM = "Compose a poem on old mountains and rhymes"


@pytest.fixture(scope="module")
def loading(pool_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server, and below its adapter root an expert of the pool with half its weights: a new content."""
    root = tmp_path_factory.mktemp("adapters")
    source = min((pool_dir / "experts").iterdir())
    (root / "poems").mkdir()
    (root / "poems" / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    tensors = load_file(source / "adapter_model.safetensors")
    halved = {name: tensor / 2 if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(halved, root / "poems" / "adapter_model.safetensors")
    with serving("--set", "admin_key=admin", "--set", f"adapter_root={root}") as server:
        yield server


def admin(server: Server, action: str, **body: Any) -> dict[str, Any]:
    answer = httpx.post(f"{server.url}/v1/{action}_lora_adapter", json=body, headers=ADMIN, timeout=60)
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


def chat(server: Server) -> dict[str, Any]:
    messages = [{"role": "user", "content": POEM}]
    answer: dict[str, Any] = server.post(
        "/v1/chat/completions", model="auto", messages=messages, max_tokens=4, temperature=0
    )
    return answer


def test_auto_finds_an_adapter_that_came_with_examples(loading: Server) -> None:
    before = loading.post("/v1/route", input=POEM)
    start = time.perf_counter()
    loaded = admin(loading, "load", lora_name="poems", lora_path="poems", routing_examples=EXAMPLES)
    assert time.perf_counter() - start < 1
    assert (loaded["routable"], loaded["route_from"]) == (True, "examples")
    answer = chat(loading)
    assert answer["loramux"]["route"]["experts"][0]["id"] == "poems"
    assert answer["loramux"]["blend"]["rank"] > 0
    assert loading.post("/v1/route", input=POEM)["experts"][0]["id"] == "poems"
    admin(loading, "unload", lora_name="poems")
    assert loading.post("/v1/route", input=POEM) == before
    assert "poems" not in [one["id"] for one in chat(loading)["loramux"]["route"]["experts"]]
    again = admin(loading, "load", lora_name="poems", lora_path="poems")
    assert again["routable"] is False
    assert loading.post("/v1/route", input=POEM) == before
