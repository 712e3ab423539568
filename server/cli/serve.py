"""`loramux serve`."""

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import socket
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
import uvicorn

from loramux.server.cli.flags import put
from loramux.server.errors import StartError
from loramux.server.listener import address_of, listen
from loramux.server.logs import configure_logs
from loramux.server.memory.give_back import starting
from loramux.server.settings import DEFAULT_POOL, Settings, load_settings

if TYPE_CHECKING:
    from loramux.server.parts import Parts


def serve(
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    pool: Annotated[Path | None, typer.Option(help="Pool directory; default: the pool that ships.")] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Base in place of the pool's: a model folder, a GGUF file, a package with one."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    quantization: Annotated[str | None, typer.Option(help="auto, none, nf4, int8 or int4.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Server that generates in place of this process, http://host:port; repeatable."),
    ] = None,
    replicas: Annotated[int | None, typer.Option(help="Processes that generate; 0: this one does.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting, as limits.max_n=4; repeatable.")
    ] = None,
) -> None:
    """Serve a pool over HTTP. Every setting: docs/configuration.md.

    Example: loramux serve --pool my-pool --port 8000 --set limits.max_n=4
    """
    named = {
        "host": host, "port": port, "pool": pool, "base": base, "device": device, "dtype": dtype,
        "quantization": quantization, "log_level": log_level, "replicas": replicas,
    }  # fmt: skip
    flags: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    if backend:
        flags["backend"] = {"urls": backend}
    for text in setting or ():
        put(flags, text)
    run(load_settings(config, flags))


def run(settings: Settings) -> None:
    """Load the pool and serve until told to stop.

    Raises:
        StartError, AdapterError, RouterError: nothing was served.
    """
    # Nothing is ever fetched: a hub id means files that are in the local cache already.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    configure_logs(settings.log_level)
    with contextlib.closing(listen(settings.host, settings.port)) as listener:
        with starting():
            from loramux.server.light_imports import import_for_serving

            import_for_serving()
            from loramux.server.app import create_app
            from loramux.server.assemble import assemble
            from loramux.server.edge.patience import PatientProtocol

            gc.freeze()  # modules stay: the collection after a start need not go through them
            parts = assemble(settings)
            app = create_app(parts)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="on",
            server_header=False,
            http=type("Protocol", (PatientProtocol,), {"header_seconds": settings.header_seconds}),
            timeout_keep_alive=settings.keep_alive_seconds,
        )
        asyncio.run(_Server(config, parts, address_of(settings.host, listener)).serve(sockets=[listener]))
        # What `starting` froze would else count as leaked, which libraries say at the end, line by line.
        gc.unfreeze()
        # A supervisor starts a process again when it fails, not when it ends well.
        if (reason := parts.engine.stats().dead) is not None:
            raise StartError(f"stopped, because {reason}")


class _Server(uvicorn.Server):
    """uvicorn, with a drain before the exit.

    The first SIGTERM or SIGINT makes /ready say no, lets requests finish for `drain_seconds`, ends the rest
    with an error, and only then closes the socket. The second ends everything at once.
    """

    def __init__(self, config: uvicorn.Config, parts: "Parts", url: str) -> None:
        super().__init__(config)
        self._parts = parts
        self._url = url
        self._loop: asyncio.AbstractEventLoop | None = None
        self._leaving: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening, and say so."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=sockets)
        if self.started:
            settings = self._parts.settings
            question = DEFAULT_QUESTION if settings.pool == DEFAULT_POOL else QUESTION
            print(ready_line(self._url, question, needs_key=bool(self._parts.api_keys)), flush=True)

    async def on_tick(self, counter: int) -> bool:
        """uvicorn asks ten times a second whether to go on: a dead engine answers nobody any more."""
        stop = await super().on_tick(counter)
        return stop or self._parts.engine.stats().dead is not None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came, on the main thread."""
        if self._loop is None or not self.started or self._leaving is not None:
            super().handle_exit(sig, frame)
        else:
            self._loop.call_soon_threadsafe(self._leave, sig)

    def _leave(self, sig: int) -> None:
        if self._leaving is None:
            logging.getLogger("loramux").info(
                "%s: %d requests to finish", signal.Signals(sig).name, self._parts.lifecycle.active
            )
            self._leaving = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        from loramux.server.app import shut_down

        await shut_down(self._parts)
        self.should_exit = True


# Something that an expert of the pool that ships is for; of another pool nothing is known.
DEFAULT_QUESTION = "What is the total number of wins when the team is Arsenal?"
QUESTION = "Say hello in one sentence."


def ready_line(url: str, question: str = QUESTION, *, needs_key: bool) -> str:
    """One line: where the server is, and a command to try it with."""
    message = {"role": "user", "content": question}
    body = json.dumps({"model": "auto", "temperature": 0, "max_tokens": 48, "messages": [message]})
    key = "-H 'Authorization: Bearer YOUR_KEY' " if needs_key else ""
    headers = f"{key}-H 'Content-Type: application/json'"
    return f"loramux is ready at {url}  try: curl {url}/v1/chat/completions {headers} -d '{body}'"
