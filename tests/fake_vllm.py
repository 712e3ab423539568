"""The part of vLLM's HTTP surface that loramux uses, with what it refuses, over a real model through PEFT.

It stands for a foreign server, so it shares no code with ours: adapters are read by PEFT from the directories
that it is told of, and tokens come from transformers. What is refused and how was taken from vLLM 0.33 and
tried on 0.32: a name twice is a 400, a missing path or name a 404, too large a rank a 500, and a restart
forgets all adapters.
"""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from peft import PeftModel
from starlette.types import ASGIApp, Receive, Scope, Send
from transformers import AutoModelForCausalLM, AutoTokenizer

#: Tokens of a page of its cache; vLLM has 16.
BLOCK = 4
#: Ends of a line for Python, not for server-sent events; vLLM sends them as they are.
LINE_ENDS = "\x85\u2028\u2029"


@dataclass(eq=False)
class FakeVllm:
    """Set its fields to make it another server; `calls` are the adapters loaded and unloaded so far."""

    base: Path
    name: str = "loramux-demo-base"
    root: str | None = None
    version: str = "0.33.0"
    max_lora_rank: int = 64
    max_model_len: int = 1024
    updating: bool = True
    token_ids: bool = True
    raw_logprobs: bool = True
    key: str | None = None
    break_after: int | None = None
    prompt_tokens_details: bool = True
    refuse: int | None = None
    calls: list[tuple[str, str]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    adapters: dict[str, str] = field(default_factory=dict)
    cached: list[tuple[str, list[int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(self.base)
        self._peft: PeftModel | None = None
        self._lock = threading.Lock()

    def restart(self) -> None:
        """As a process that was started anew: every adapter is forgotten."""
        self.adapters.clear()
        self.cached.clear()
        self._peft = None
        self._model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()

    def app(self) -> ASGIApp:
        app = FastAPI()

        @app.get("/health")
        def health() -> Response:
            return Response() if self.refuse != 503 else error(503, "the engine is dead")

        @app.get("/version")
        def version() -> dict[str, str]:
            return {"version": self.version}

        @app.get("/v1/models")
        def models() -> dict[str, Any]:
            root = str(self.base) if self.root is None else self.root
            cards = [{"id": self.name, "root": root, "parent": None, "max_model_len": self.max_model_len}]
            cards += [
                {"id": name, "root": path, "parent": self.name, "max_model_len": None}
                for name, path in self.adapters.items()
            ]
            return {"object": "list", "data": cards}

        @app.post("/tokenize")
        async def tokenize(request: Request) -> dict[str, Any]:
            body = await request.json()
            ids = self._tokenizer(body["prompt"], add_special_tokens=body.get("add_special_tokens", True))
            return {"tokens": ids["input_ids"], "count": len(ids["input_ids"])}

        @app.post("/v1/load_lora_adapter")
        async def load(request: Request) -> Response:
            if not self.updating:
                return JSONResponse({"detail": "Not Found"}, 404)
            return self._load(**await request.json())

        @app.post("/v1/unload_lora_adapter")
        async def unload(request: Request) -> Response:
            name = (await request.json())["lora_name"]
            if name not in self.adapters:
                return error(404, f"The lora adapter '{name}' cannot be found.")
            del self.adapters[name]
            self.calls.append(("unload", name))
            return Response(f"Success: LoRA adapter '{name}' removed successfully.")

        @app.post("/v1/completions")
        async def completions(request: Request) -> Response:
            body = await request.json()
            self.bodies.append(body)
            if self.refuse is not None:
                return error(self.refuse, "no")
            if body["model"] not in (self.name, *self.adapters):
                return error(404, f"The model `{body['model']}` does not exist.")
            if len(body["prompt"]) + body["max_tokens"] > self.max_model_len:
                return error(400, "this is longer than the model's maximum context")
            if body.get("stream"):
                return StreamingResponse(self._events(body), media_type="text/event-stream")
            chosen = self._answer(body)
            choice = {"index": 0, "text": "", "prompt_logprobs": self._prompt_logprobs(body)} | chosen[-1]
            return JSONResponse({"object": "text_completion", "choices": [choice]})

        return self._with_key(app)

    def _with_key(self, app: ASGIApp) -> ASGIApp:
        async def keyed(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http" and self.key is not None:
                given = dict(scope["headers"]).get(b"authorization", b"").decode()
                if given != f"Bearer {self.key}":
                    await JSONResponse({"error": "Unauthorized"}, 401)(scope, receive, send)
                    return
            await app(scope, receive, send)

        return keyed

    def _load(self, lora_name: str, lora_path: str, load_inplace: bool = False) -> Response:
        assert not load_inplace
        if lora_name in self.adapters:
            return error(400, f"The lora adapter '{lora_name}' has already been loaded. If you want ...")
        folder = Path(lora_path)
        if not (folder / "adapter_config.json").is_file():
            return error(404, f"Loading lora {lora_name} failed: No adapter found for {lora_path}")
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        if rank > self.max_lora_rank:
            return error(500, f"LoRA rank {rank} is greater than max_lora_rank {self.max_lora_rank}.")
        with self._lock:
            if self._peft is None:
                self._peft = PeftModel.from_pretrained(self._model, lora_path, adapter_name=lora_name)
            elif lora_name not in self._peft.peft_config:
                self._peft.load_adapter(lora_path, adapter_name=lora_name)
            self._peft.eval()
        self.adapters[lora_name] = lora_path
        self.calls.append(("load", lora_name))
        return Response(f"Success: LoRA adapter '{lora_name}' added successfully.")

    @torch.inference_mode()
    def _logits(self, name: str, ids: list[int]) -> torch.Tensor:
        """`[tokens, vocabulary]`."""
        with self._lock:
            tokens = torch.tensor([ids])
            if name == self.name:
                if self._peft is None:
                    return self._model(tokens).logits[0]
                with self._peft.disable_adapter():
                    return self._peft(tokens).logits[0]
            assert self._peft is not None
            self._peft.set_adapter(name)
            return self._peft(tokens).logits[0]

    def _answer(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The chunks of an answer: one a token."""
        generator = torch.Generator().manual_seed(body.get("seed") or 0)
        ids, chunks = list(body["prompt"]), []
        for number in range(body["max_tokens"]):
            raw = self._logits(body["model"], ids)[-1]
            pushed = raw.clone()
            for token, bias in body.get("logit_bias", {}).items():
                pushed[int(token)] += bias
            if body["temperature"] == 0:
                token = int(pushed.argmax())
            else:
                chances = torch.softmax(pushed / body["temperature"], dim=-1)
                token = int(torch.multinomial(chances, 1, generator=generator))
            ids.append(token)
            chunk: dict[str, Any] = {"index": 0, "text": LINE_ENDS}
            chunk |= {"finish_reason": None, "stop_reason": None}
            if body.get("return_token_ids") and self.token_ids:
                chunk["token_ids"] = [token]
            if body.get("logprobs") is not None:
                scores = torch.log_softmax(raw if self.raw_logprobs else pushed, dim=-1)
                chunk["logprobs"] = {
                    "tokens": [f"token_id:{token}"],
                    "token_logprobs": [float(scores[token])],
                    "top_logprobs": [with_best(scores, token, body["logprobs"])],
                }
            chunks.append(chunk)
            if token in body["stop_token_ids"]:
                chunk["finish_reason"], chunk["stop_reason"] = "stop", token
                break
            if number == body["max_tokens"] - 1:
                chunk["finish_reason"] = "length"
        return chunks

    def _usage(self, body: dict[str, Any]) -> dict[str, Any]:
        """With whole blocks of the longest head that an earlier prompt of this model had, the last token
        always computed; a zero is left out."""
        prompt, found = body["prompt"], 0
        for model, other in self.cached:
            if model == body["model"]:
                same = next(
                    (n for n, pair in enumerate(zip(prompt, other, strict=False)) if len({*pair}) > 1), None
                )
                head = min(len(prompt), len(other)) if same is None else same
                found = max(found, min(head, len(prompt) - 1) // BLOCK * BLOCK)
        self.cached.append((body["model"], prompt))
        usage = {"prompt_tokens": len(prompt)}
        details = {"prompt_tokens_details": {"cached_tokens": found}}
        return usage | details if found and self.prompt_tokens_details else usage

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        usage = self._usage(body)
        for number, chunk in enumerate(self._answer(body)):
            if number == self.break_after:
                raise ConnectionError("broken off")
            event = {"object": "text_completion", "choices": [chunk]}
            yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
        if (body.get("stream_options") or {}).get("include_usage"):
            yield f"data: {json.dumps({'object': 'text_completion', 'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"

    def _prompt_logprobs(self, body: dict[str, Any]) -> list[Any] | None:
        wanted = body.get("prompt_logprobs")
        if wanted is None:
            return None
        ids = body["prompt"]
        scores = torch.log_softmax(self._logits(body["model"], ids), dim=-1)
        rows: list[Any] = [None]
        for row, token in zip(scores[:-1], ids[1:], strict=True):
            table = with_best(row, token, wanted)
            rows.append({name.removeprefix("token_id:"): {"logprob": v} for name, v in table.items()})
        return rows


def with_best(scores: torch.Tensor, token: int, count: int) -> dict[str, float]:
    """A token and the `count` best, as vLLM lists them."""
    best = torch.topk(scores, count) if count else None
    found = {f"token_id:{token}": float(scores[token])}
    if best is not None:
        for value, id in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            found.setdefault(f"token_id:{id}", value)
    return found


def error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "x", "param": None, "code": status}}, status)


@contextmanager
def listening(server: FakeVllm, port: int = 0) -> Iterator[str]:
    """The server on a free port, or a given one, in a thread of its own; its address."""
    # A connection that is accepted while it ends would be waited for, and then left open.
    config = uvicorn.Config(
        server.app(), port=port, log_level="critical", lifespan="off", timeout_graceful_shutdown=1
    )
    runner = uvicorn.Server(config)

    async def serve() -> None:
        await runner.serve()
        for connection in runner.server_state.connections:
            connection.transport.abort()  # type: ignore[union-attr]
        await asyncio.sleep(0)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    while not runner.started:
        assert thread.is_alive()
        thread.join(0.002)
    try:
        yield f"http://127.0.0.1:{runner.servers[0].sockets[0].getsockname()[1]}"
    finally:
        runner.should_exit = True
        thread.join(20)
    assert not thread.is_alive()
