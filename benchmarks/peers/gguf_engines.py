"""loramux and llama.cpp on the file that the pool that ships is on."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import httpx

from .client import Mixture
from .engines import CORES, Ours, PeerFailedError, Server
from .gguf_files import GgufFiles

HERE = Path(__file__).parent
MIB = 2**20
#: llama.cpp divides its cache among its slots; a prompt and an answer must fit.
SLOTS, SLOT_TOKENS = 16, 256


@dataclass(frozen=True)
class Held:
    """What a process holds: bytes resident, its share of them (a page of two processes counts half in each),
    and the seconds of processor time that it has used."""

    resident: int
    share: int
    cpu_s: float

    @classmethod
    def by(cls, process: int) -> Held:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
        sizes = {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":") for line in lines)}
        times = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks = int(times[11]) + int(times[12])
        return cls(sizes["Rss"], sizes["Pss"], ticks / os.sysconf("SC_CLK_TCK"))


@dataclass
class GgufServer(Server):
    """A server over the pool that ships."""

    poll_s: ClassVar[float] = 0.02

    files: GgufFiles  # type: ignore[assignment]
    started: Held | None = field(default=None, init=False)

    @property
    def label(self) -> str:
        return self.name

    @property
    def log(self) -> Path:
        return self.cache / "logs" / f"gguf-{self.label.replace(' ', '-')}.log"

    @property
    def url(self) -> str:
        return self._url

    def held(self) -> Held:
        assert self._process is not None
        return Held.by(self._process.pid)

    async def start(self) -> None:
        await super().start()
        self.started = self.held()

    async def say(self, question: str, mixture: Mixture, tokens: int) -> dict[str, Any]:
        """A greedy chat completion with log-probabilities, as the server gives it."""
        body = {
            "messages": [{"role": "user", "content": question}], "max_tokens": tokens, "temperature": 0,
            "logprobs": True, "top_logprobs": 1, **self.selection(mixture),
        }  # fmt: skip
        async with httpx.AsyncClient(base_url=self._url, trust_env=False, timeout=300) as client:
            response = await client.post("/v1/chat/completions", json=body)
        if response.status_code != 200:
            raise PeerFailedError(f"{self.label}: {response.status_code}: {response.text[:300]}")
        answer: dict[str, Any] = response.json()
        return answer


@dataclass
class LoramuxGguf(GgufServer, Ours):
    """loramux with the pool that ships; `dtype` says which weights.

    `file`: as shipped, the blocks of the file. `float32`: the numbers that they stand for. `bfloat16`: those
    numbers rounded to bfloat16, a checkpoint that is left as it is; `bfloat16 widened`: to float32.
    """

    health = "/ready"

    @property
    def label(self) -> str:
        return self.name if self.dtype == "file" else f"{self.name} {self.dtype}"

    def command(self, port: int) -> list[str | Path]:
        weights: dict[str, list[str | Path]] = {
            "file": [],
            "float32": ["--dtype", "float32"],
            "bfloat16": ["--base", self.files.bfloat16],
            "bfloat16 widened": ["--base", self.files.bfloat16, "--dtype", "float32"],
        }
        serve = [self.python.with_name("loramux"), "serve", "--port", str(port)]
        return [*serve, *weights[self.dtype]]

    def selection(self, mixture: Mixture) -> dict[str, Any]:
        if len(mixture) < 2:
            return {"model": mixture[0][0] if mixture else self.files.base_id}
        return {
            "model": self.files.base_id, "lora": [{"id": name, "scale": scale} for name, scale in mixture]
        }  # fmt: skip


@dataclass
class LlamaCpp(GgufServer):
    """llama.cpp's server, with all adapters of the pool. It computes requests together that want the same
    adapters at the same scales, and others after one another."""

    name = "llama.cpp"
    setup = "llama.cpp"
    packages = ("xllamacpp",)

    @classmethod
    def sources_in(cls, cache: Path) -> Path:
        """The folder of its sources, where its converter is."""
        return cache / f"venv-{cls.setup}" / "llama.cpp"

    def environment(self) -> dict[str, str]:
        # ggml for this very processor, in place of the wheel's, which takes no more than AVX2.
        libraries = sorted((self.cache / f"venv-{self.setup}" / "ggml" / "src").glob("libggml*.so"))
        return {"LD_PRELOAD": ":".join(map(str, libraries))}

    def command(self, port: int) -> list[str | Path]:
        counts = [str(count) for count in (port, CORES, SLOTS, SLOT_TOKENS)]
        files = [self.files.gguf, *self.files.loras.values()]
        return [self.python, HERE / "llama_cpp_server.py", *counts, *files]

    def selection(self, mixture: Mixture) -> dict[str, Any]:
        numbers = {name: number for number, name in enumerate(self.files.loras)}
        # What is not named is not applied.
        return {
            "model": "any", "lora": [{"id": numbers[name], "scale": scale} for name, scale in mixture]
        }  # fmt: skip

    def features(self) -> str:
        """What its arithmetic is compiled for, as it says itself."""
        return next((line for line in self.log.read_text().splitlines() if line.startswith("CPU :")), "")
