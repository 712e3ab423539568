"""The command `llm`, with models as its documentation says to name those of a server of this kind."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import API, ASK, check, finished, started

started("llm", "openai")
HOME = Path(tempfile.mkdtemp())
MODELS = f"""
- model_id: loramux
  model_name: auto
  api_base: {API}
  supports_schema: true
  supports_tools: true
- model_id: loramux-responses
  model_name: auto
  api_base: {API}
  responses: true
  supports_schema: true
- model_id: loramux-base
  model_name: {os.environ["LORAMUX_BASE"]}
  api_base: {API}
  completion: true
"""
(HOME / "extra-openai-models.yaml").write_text(MODELS, encoding="utf-8")
COMMAND = Path(sys.executable).parent / "llm"
SHORT = ["-o", "max_tokens", "12", "-o", "temperature", "0"]


def llm(*arguments: str) -> str:
    """What the command prints."""
    environment = {**os.environ, "LLM_USER_PATH": str(HOME)}
    done = subprocess.run([COMMAND, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@check
def models_are_listed() -> None:
    listed = llm("models")
    assert all(f"OpenAI Chat: {name}" in listed or name in listed for name in ("loramux", "loramux-base"))


@check
def chat_streamed_and_whole() -> None:
    assert llm("-m", "loramux", ASK, *SHORT) == llm("-m", "loramux", "--no-stream", ASK, *SHORT) != ""


@check
def a_conversation_goes_on() -> None:
    assert llm("-m", "loramux", ASK, *SHORT)
    assert llm("-c", "Why?", *SHORT)
    logged = json.loads(llm("logs", "-n", "2", "--json"))
    assert logged[0]["conversation_id"] == logged[1]["conversation_id"]
    assert logged[0]["input_tokens"] or logged[1]["input_tokens"]


@check
def a_schema_is_followed() -> None:
    schema = {
        "type": "object",
        "properties": {"lucky": {"type": "boolean"}, "number": {"type": "integer", "maximum": 99}},
        "required": ["lucky", "number"],
        "additionalProperties": False,
    }
    for model in ("loramux", "loramux-responses"):
        answer = json.loads(llm("-m", model, "--schema", json.dumps(schema), ASK, "-o", "temperature", "0"))
        assert isinstance(answer["lucky"], bool)
        assert isinstance(answer["number"], int)


@check
def functions_may_be_offered() -> None:
    offered = 'def now() -> str:\n    "The time."\n    return "noon"'
    assert llm("-m", "loramux", "--functions", offered, ASK, *SHORT) is not None


@check
def responses() -> None:
    assert llm("-m", "loramux-responses", ASK, "-o", "temperature", "0")


@check
def completions() -> None:
    assert llm("-m", "loramux-base", "The capital of", *SHORT)


finished()
