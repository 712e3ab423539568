"""The load generator guidellm, as it comes: streams for half a minute, whole answers, completions."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from checks import URL, check, finished, started

started("guidellm")
COMMAND = Path(sys.executable).parent / "guidellm"
PROMPT, ANSWER = 64, 16


def load(seconds: int, streams: int, backend: str = "") -> dict[str, Any]:
    """What it reports of requests that are sent one after another by so many clients at once."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            COMMAND, "run", "--disable-console",
            "--backend", f"kind=openai_http,target={URL}{backend}",
            "--profile", f"kind=concurrent,streams={streams}",
            "--constraint", f"kind=max_duration,seconds={seconds}",
            "--tokenizer", f"kind=huggingface_auto,model={os.environ['LORAMUX_BASE_FOLDER']}",
            "--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={ANSWER}",
            "--output", f"kind=json,path={report}",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        (found,) = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
        return found


def said(found: dict[str, Any]) -> str:
    """How many were answered: all, with as many tokens as were asked for."""
    totals, metrics = found["metrics"]["request_totals"], found["metrics"]
    assert totals["errored"] == 0, found["requests"]["errored"][:1]
    assert totals["successful"] >= 10
    answers = metrics["output_token_count"]["successful"]
    assert (answers["min"], answers["max"]) == (ANSWER, ANSWER)
    assert metrics["prompt_token_count"]["successful"]["min"] >= PROMPT
    return f"{totals['successful']} answers of {ANSWER} tokens, {totals['errored']} errors"


@check
def eight_clients_stream_for_30_seconds() -> str:
    found = load(30, 8)
    assert found["duration"] > 25
    for metric in ("time_to_first_token_ms", "inter_token_latency_ms"):
        assert found["metrics"][metric]["successful"]["median"] > 0
    return said(found)


@check
def whole_answers() -> str:
    return said(load(10, 4, ",stream=false"))


@check
def completions_streamed() -> str:
    return said(load(10, 4, ",request_format=/v1/completions"))


finished()
