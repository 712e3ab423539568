"""loramux in front of a real vLLM: whether it answers as PEFT computes, and what it costs.

    benchmarks/peers/setup.sh vllm [VENV_DIR]
    python benchmarks/backends.py --vllm VENV_DIR/bin/python [--dtypes float32 bfloat16] [--save FILE]

For each type of number a vLLM is started on the base of a pool, and loramux in front of it.

- Values: greedy answers of blends, and of the base and of one expert alone, are scored again by transformers
  with PEFT's `cat` of the experts' own directories, in the same type and in float32, and compared with what
  vLLM itself answers for the same adapter. In bfloat16 two programs that are both right differ in the last
  digits of everything, so the base alone, where no adapter is, says how much of it is theirs.
- Throughput: 16 requests over 8 blends through loramux, and the same 16 sent to the same vLLM by the names of
  the same 8 adapters, in turns; the ratio is of the medians. vLLM computes the same in both, on plain
  adapters of the padded rank; what is measured is loramux.
- The first answer of a blend that nobody has asked for, and the second.
"""

import argparse
import asyncio
import contextlib
import importlib
import json
import os
import re
import runpy
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

runpy.run_path(str(Path(__file__).parent / "run.py"))["add_package"]("benchmarks")
machine: Any = importlib.import_module("benchmarks.machine")
client: Any = importlib.import_module("benchmarks.peers.client")

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 900.0
REQUESTS, BLENDS, RANK = 16, 8, 32
TEXTS = (
    "What is the total number of wins when the team is Arsenal?",
    "Write a function that returns the sum of a list.",
    "How do I reset the PIN of my card?",
    "Which court decides on this matter?",
)


@dataclass(frozen=True)
class Plan:
    """What one run does."""

    pool: Path
    vllm: Path
    tokens: int
    rounds: int


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(
    command: Sequence[str | Path], log: Path, url: str, path: str, **environment: str
) -> Iterator[None]:
    """A server until the context ends; entered when `path` answers 200."""
    with log.open("wb") as sink:
        process = subprocess.Popen(  # noqa: S603
            command, stdout=sink, stderr=sink, start_new_session=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **environment},
        )  # fmt: skip
    try:
        limit = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}{path}", timeout=10, trust_env=False).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > limit:
                raise SystemExit(f"{command[0]} did not start; {log} ends:\n{log.read_text()[-2000:]}")
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def vllm(plan: Plan, base: Path, name: str, dtype: str, place: Path) -> Iterator[str]:
    """vLLM with adapters, on every core; its address."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        plan.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", base, "--served-model-name", name,
        "--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--max-model-len", "1024",
        "--enable-lora", "--max-loras", str(BLENDS), "--max-cpu-loras", str(2 * BLENDS),
        "--max-lora-rank", str(RANK), "--max-num-seqs", str(REQUESTS), "--no-enable-log-requests",
    ]  # fmt: skip
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    environment = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", cores), "DO_NOT_TRACK": "1",
    }  # fmt: skip
    with running(command, place / "vllm.log", url, "/health", **environment):
        yield url


@contextlib.contextmanager
def loramux(plan: Plan, backend: str, place: Path) -> Iterator[str]:
    """loramux in front of it; its address."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        Path(sys.executable).with_name("loramux"), "serve", "--pool", plan.pool, "--port", str(port),
        "--backend", backend, "--set", f"backend.folder={place / 'blends'}",
        "--set", f"backend.max_lora_rank={RANK}",
        "--set", f"backend.max_cpu_loras={2 * BLENDS}", "--set", "verify_pool=false",
    ]  # fmt: skip
    with running(command, place / "loramux.log", url, "/ready", OMP_NUM_THREADS="1"):
        yield url


class Oracle:
    """transformers and PEFT alone."""

    def __init__(self, base: Path, experts: Mapping[str, Path], dtype: torch.dtype) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        first, *rest = experts
        model = PeftModel.from_pretrained(
            model, str(experts[first]), adapter_name=first, autocast_adapter_dtype=False
        )
        for name in rest:
            model.load_adapter(str(experts[name]), adapter_name=name, autocast_adapter_dtype=False)
        self._model = model.to(dtype).eval()
        self._first = first

    @torch.inference_mode()
    def logprobs(self, weights: Mapping[str, float], ids: Sequence[int]) -> list[float]:
        """Of every token but the first."""
        model, tokens = self._model, torch.tensor([list(ids)])
        if weights:
            model.add_weighted_adapter(list(weights), list(weights.values()), "blend", combination_type="cat")
            model.set_adapter("blend")
        try:
            with contextlib.nullcontext() if weights else model.disable_adapter():
                rows = torch.log_softmax(model(tokens).logits[0].float(), dim=-1)
        finally:
            if weights:
                model.set_adapter(self._first)
                model.delete_adapter("blend")
        return [float(row[id]) for row, id in zip(rows[:-1], ids[1:], strict=True)]


def mixtures(names: Sequence[str]) -> list[dict[str, float]]:
    """`BLENDS` different blends of two or three experts."""
    count = len(names)
    two = [{names[i % count]: 0.6, names[(i + 1) % count]: 0.4} for i in range(BLENDS // 2)]
    three = [
        {names[i % count]: 0.5, names[(i + 2) % count]: 0.3, names[(i + 3) % count]: 0.2}
        for i in range(BLENDS - BLENDS // 2)
    ]
    return two + three


def fields(weights: Mapping[str, float]) -> dict[str, Any]:
    """Of a request to loramux."""
    return {"lora": [{"id": name, "scale": weight} for name, weight in weights.items()]} if weights else {}


def values(
    front: str,
    behind: str,
    base: str,
    oracles: Mapping[str, Oracle],
    asked: Mapping[str, Mapping[str, float]],
    tokens: int,
) -> dict[str, Any]:
    """How far answers are from each oracle, and from what vLLM itself says of the same adapter, in nats."""
    found: dict[str, Any] = {}
    with open_client(front) as ours, open_client(behind) as theirs:
        for kind, weights in asked.items():
            far: dict[str, list[float]] = {name: [] for name in ("vllm", *oracles)}
            for text in TEXTS:
                prompt = post(ours, "/tokenize", model=base, prompt=text)["tokens"]
                common = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
                answer = post(
                    ours, "/v1/completions", model=base, echo=True, logprobs=0, **common, **fields(weights)
                )
                own = answer["choices"][0]["logprobs"]["token_logprobs"][1:]
                # The name of the adapter that was loaded last; and the ids, which our answers do not have.
                model = adapters(behind)[-1] if weights else base
                direct = post(
                    theirs, "/v1/completions", model=model, logprobs=0, return_token_ids=True, **common
                )["choices"][0]
                ids = [*prompt, *direct["token_ids"]]
                far["vllm"] += distances(own[-tokens:], direct["logprobs"]["token_logprobs"])
                for name, oracle in oracles.items():
                    far[name] += distances(own, oracle.logprobs(weights, ids))
            found[kind] = {
                name: {"mean": statistics.fmean(many), "max": max(many), "tokens": len(many)}
                for name, many in far.items()
            }
    return found


def distances(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(ours, theirs, strict=True)]


def adapters(behind: str) -> list[str]:
    """What vLLM has loaded, in the order in which it was."""
    cards = httpx.get(f"{behind}/v1/models", timeout=60, trust_env=False).json()["data"]
    return [card["id"] for card in cards if card.get("parent")]


def open_client(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=900, trust_env=False)


def post(http: httpx.Client, path: str, **body: Any) -> Any:
    answer = http.post(path, json=body)
    if answer.status_code != 200:
        raise SystemExit(f"{http.base_url}{path}: {answer.status_code}: {answer.text[:500]}")
    return answer.json()


async def throughput(
    front: str, behind: str, base: str, blends: Sequence[Mapping[str, float]], plan: Plan
) -> dict[str, Any]:
    """Tokens a second through loramux and without, in turns."""
    prompt = list(range(40, 72))
    common = {
        "prompt": prompt, "max_tokens": plan.tokens, "temperature": 0, "stream": True, "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    ours = [common | {"model": base} | fields(blends[i % BLENDS]) for i in range(REQUESTS)]
    await client.drive(front, ours, len(prompt))  # every blend is written and loaded
    names = adapters(behind)[-BLENDS:]
    theirs = [common | {"model": names[i % len(names)]} for i in range(REQUESTS)]
    await client.drive(behind, theirs, len(prompt))
    runs: dict[str, list[Any]] = {"loramux": [], "vllm": []}
    for turn in range(plan.rounds):
        order = [("loramux", front, ours), ("vllm", behind, theirs)]
        for name, url, bodies in order if turn % 2 else reversed(order):
            runs[name].append((await client.drive(url, bodies, len(prompt))).summary())
    found: dict[str, Any] = {
        name: {key: statistics.median(run[key] for run in many) for key in many[0]} | {"runs": many}
        for name, many in runs.items()
    }
    found["of_vllm"] = found["loramux"]["tokens_per_second"] / found["vllm"]["tokens_per_second"]
    return found


def first_answers(url: str, base: str, names: Sequence[str]) -> dict[str, float]:
    """Seconds to one token with blends that nobody has asked for yet, and again."""
    new, again = [], []
    with open_client(url) as http:
        for number in range(5):
            blend = {names[0]: 0.11 + number / 100, names[1]: 0.3}
            for times in (new, again):
                started = time.perf_counter()
                post(http, "/v1/completions", model=base, prompt="a", max_tokens=1, **fields(blend))
                times.append(time.perf_counter() - started)
    return {"new_blend_s": statistics.median(new), "loaded_blend_s": statistics.median(again)}


def measure(plan: Plan, dtype: str) -> dict[str, Any]:
    """Everything in one type of number."""
    manifest = json.loads((plan.pool / "pool.json").read_text())
    base = manifest["base"]["id"]
    folder = plan.pool / manifest["base"]["path"]
    experts = {one["id"]: plan.pool / one["path"] for one in manifest["experts"]}
    names = list(experts)
    blends = mixtures(names)
    asked = {"base": {}, "one expert": {names[0]: 1.0}, "two experts": blends[0], "three experts": blends[-1]}
    with tempfile.TemporaryDirectory() as place, vllm(plan, folder, base, dtype, Path(place)) as behind:
        version = httpx.get(f"{behind}/version", timeout=60, trust_env=False).json()["version"]
        with loramux(plan, behind, Path(place)) as front:
            chosen = {name: experts[name] for weights in asked.values() for name in weights}
            oracles = {"float32": Oracle(folder, chosen, torch.float32)}
            if dtype != "float32":
                oracles[dtype] = Oracle(folder, chosen, getattr(torch, dtype))
            return {
                "vllm": version,
                "logprobs": values(front, behind, base, oracles, asked, min(plan.tokens, 32)),
                "first_answer": first_answers(front, base, names),
                "throughput": asyncio.run(throughput(front, behind, base, blends, plan)),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vllm", type=Path, required=True, help="interpreter of the environment with vLLM")
    parser.add_argument("--pool", type=Path, default=ROOT / "tests" / "demo_pool", help="with its base in it")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=64, help="of one answer")
    parser.add_argument("--rounds", type=int, default=5, help="of the throughput, each way")
    parser.add_argument("--save", type=Path, help="JSON file to write")
    chosen = parser.parse_args()
    plan = Plan(chosen.pool, chosen.vllm, chosen.tokens, chosen.rounds)
    result: dict[str, Any] = {
        "benchmark": "backends",
        "pool": re.sub(r".*/", "", str(chosen.pool.resolve())),
        "requests": REQUESTS,
        "blends": BLENDS,
        "answer_tokens": chosen.tokens,
        "max_lora_rank": RANK,
        "machine": machine.facts(),
        "versions": machine.versions(),
    }
    for dtype in chosen.dtypes:
        result[dtype] = measure(plan, dtype)
    text = json.dumps(result, indent=1)
    print(text)
    if chosen.save:
        chosen.save.write_text(text + "\n")


if __name__ == "__main__":
    main()
