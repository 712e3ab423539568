"""litellm's proxy in front: what it passes on, and that one client's mistake takes the model from nobody."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from checks import API, ASK, check, finished
from openai import APIStatusError, OpenAI

print(f"version litellm {version('litellm')} (proxy), openai {version('openai')}", flush=True)
TURNS = [{"role": "user", "content": ASK}]
SHORT = {"messages": TURNS, "max_tokens": 8, "temperature": 0}
TO = {"api_base": API, "api_key": "none"}
KEY = "sk-of-the-proxy"
# One by each of its names for a server of this kind, and whatever else is asked for. By default it leaves a
# server alone for seconds after a 404, which is an answer to one client; where there is no other server, this
# helps nobody.
CONFIG = {
    "model_list": [
        {"model_name": "loramux", "litellm_params": {"model": "openai/auto", **TO}},
        {"model_name": "loramux-vllm", "litellm_params": {"model": "hosted_vllm/auto", **TO}},
        {"model_name": "*", "litellm_params": {"model": "openai/*", **TO}},
    ],
    "router_settings": {"num_retries": 0, "disable_cooldowns": True},
    "litellm_settings": {"telemetry": False},
    "general_settings": {"master_key": KEY},
}
NAMES = ("loramux", "loramux-vllm", "auto")


@contextlib.contextmanager
def proxy() -> Iterator[str]:
    """Its address while it runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(tempfile.mkdtemp())
    (folder / "config.yaml").write_text(json.dumps(CONFIG), encoding="utf-8")
    command = [
        Path(sys.executable).parent / "litellm",
        "--config",
        folder / "config.yaml",
        "--port",
        str(port),
    ]
    # Its prices are in the package too, and it needs no network.
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_DOCS": "True"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1"], cwd=folder, env=environment, stdout=log, stderr=log
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, (folder / "log").read_text()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health/liveliness"):  # noqa: S310
                break
            time.sleep(0.5)
        else:
            raise AssertionError((folder / "log").read_text())
        yield url
    finally:
        process.terminate()
        process.wait(60)


def status(url: str, path: str, body: dict[str, object]) -> int:
    """Of the proxy's answer."""
    data, headers = (
        json.dumps(body).encode(),
        {"content-type": "application/json", "authorization": f"Bearer {KEY}"},
    )
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, data, headers)) as answer:  # noqa: S310
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


with proxy() as url:
    client = OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)

    @check
    def chat_streamed_and_whole() -> None:
        for name in NAMES:
            whole = client.chat.completions.create(model=name, **SHORT).choices[0].message.content
            chunks = list(client.chat.completions.create(model=name, stream=True, **SHORT))
            said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            assert said == whole != "", name

    @check
    def responses() -> None:
        for name in NAMES:
            answer = client.responses.create(model=name, input=ASK, max_output_tokens=8, temperature=0)
            assert answer.output_text, name

    @check
    def messages_of_anthropic() -> None:
        for name in NAMES:
            assert status(url, "/v1/messages", {"model": name, **SHORT}) == 200, name

    @check
    def own_mixture_passes_through() -> None:
        expert = {"lora": [{"id": "select-table", "scale": 1.0}]}
        answer = client.chat.completions.create(model="loramux-vllm", extra_body=expert, **SHORT)
        assert answer.choices[0].message.content

    @check
    def a_mistake_of_one_takes_the_model_from_nobody() -> str:
        schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 3}}}
        told = []
        for path, body in (
            ("/v1/chat/completions", {"model": "nobody", "messages": TURNS}),
            ("/v1/responses", {"model": "nobody", "input": ASK}),
            ("/v1/chat/completions", {"model": "auto", "messages": TURNS, "response_format": schema}),
            ("/v1/responses", {"model": "auto", "input": ASK, "previous_response_id": "resp_1"}),
            ("/v1/images/generations", {"model": "auto", "prompt": "a cat"}),
            ("/v1/audio/speech", {"model": "auto", "input": "hello", "voice": "alloy"}),
            ("/v1/moderations", {"model": "auto", "input": "hello"}),
        ):
            found = status(url, path, body)
            told.append(f"{path} {found}")
            assert found >= 400, told
            try:
                assert client.chat.completions.create(model="auto", **SHORT).choices
            except APIStatusError as error:
                raise AssertionError(f"after {told[-1]}: {error}") from error
        return ", ".join(told)


finished()
