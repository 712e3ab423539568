"""Client libraries, unmodified, each in an environment of its own, against the real command.

`make clients` runs it, with a package index for Python and one for JavaScript. Environments are kept in
`build/clients`; what the clients said goes to docs/clients.md.
"""

import json
import os
import shutil
import subprocess
import venv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loramux.server.pool.manifest import hash_file
from tests.e2e.conftest import Server, serving
from tests.kit import DEMO_POOL
from tests.tool_kit import template

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "tests" / "clients"
ENVIRONMENTS = ROOT / "build" / "clients"
REPORT = ROOT / "docs" / "clients.md"
BASE = "loramux-demo-base"

#: What each script needs.
PYTHON = {
    "with_langchain.py": ["langchain-openai"],
    "with_llama_index.py": ["llama-index-llms-openai-like"],
    "with_litellm.py": ["litellm"],
    "with_pydantic_ai.py": ["pydantic-ai-slim[openai]"],
    "with_lm_eval.py": ["lm-eval[api]", "transformers"],
    "with_instructor.py": ["instructor"],
    "with_llm.py": ["llm"],
    "with_litellm_proxy.py": ["litellm[proxy]"],
    "with_guidellm.py": ["guidellm"],
}
NODE = {
    "with_openai.mjs": ["openai"],
    "with_ai.mjs": ["ai", "@ai-sdk/openai", "@ai-sdk/openai-compatible", "zod"],
}

pytestmark = [
    pytest.mark.skipif("TRY_CLIENTS" not in os.environ, reason="needs package indexes; run by make clients"),
    pytest.mark.timeout(1200),
]


@dataclass
class Said:
    """What the clients said: the version and the lines of each."""

    lines: dict[str, list[str]] = field(default_factory=dict)

    def written(self) -> str:
        """As a page."""
        parts = [
            "# Clients\n\nTried unmodified by `make clients` (`tests/clients`), each in its own "
            "environment,\n"
            "against `loramux serve` on the tests' pool, with a chat template that knows tools. This page\n"
            "is what they said.\n"
        ]
        for version, *checks in sorted(self.lines.values()):
            name, _, rest = version.removeprefix("version ").partition(", ")
            parts.append(f"\n## {name}\n\n" + (f"With {rest}.\n\n" if rest else ""))
            parts.append("".join(f"- {check.removeprefix('ok ')}\n" for check in checks))
        return "".join(parts)


@pytest.fixture(scope="module")
def said() -> Iterator[Said]:
    found = Said()
    yield found
    if set(found.lines) == {*PYTHON, *NODE}:
        REPORT.write_text(found.written(), encoding="utf-8")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The tests' pool, with a chat template that knows tools."""
    pool = tmp_path_factory.mktemp("pool") / "pool"
    shutil.copytree(DEMO_POOL, pool)
    written = pool / "base" / "chat_template.jinja"
    written.write_text(template("hermes"), encoding="utf-8")
    manifest = json.loads((pool / "pool.json").read_text(encoding="utf-8"))
    manifest["files"]["base/chat_template.jinja"] = hash_file(written)
    (pool / "pool.json").write_text(json.dumps(manifest), encoding="utf-8")
    with serving("--pool", str(pool)) as running:
        yield running


def run(command: list[str], folder: Path, server: Server, said: Said) -> None:
    """Run a script and keep its lines."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "LORAMUX_URL": server.url,
        "LORAMUX_BASE": BASE,
        "LORAMUX_BASE_FOLDER": str(DEMO_POOL / "base"),
        "LORAMUX_EXPECTED": json.dumps(expected()) if "with_lm_eval.py" in command[-1] else "",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(("version ", "ok ", "FAILED "))]
    print("", *lines, sep="\n")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(line.startswith("ok ") for line in lines) >= 2
    said.lines[Path(command[-1]).name] = lines


@pytest.mark.parametrize("script", PYTHON)
def test_in_python(script: str, server: Server, said: Said) -> None:
    folder = ENVIRONMENTS / script.removesuffix(".py")
    if not (folder / "installed").exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([folder / "bin" / "pip", "install", "--quiet", *PYTHON[script]], check=True)
        (folder / "installed").touch()
    run([str(folder / "bin" / "python"), str(SCRIPTS / script)], folder, server, said)


@pytest.mark.parametrize("script", NODE)
def test_in_javascript(script: str, server: Server, said: Said) -> None:
    folder = ENVIRONMENTS / script.removesuffix(".mjs")
    if not (folder / "installed").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "package.json").write_text("{}")
        npm = shutil.which("npm")
        assert npm is not None, "npm is not installed"
        subprocess.run([npm, "install", "--silent", *NODE[script]], cwd=folder, check=True)
        (folder / "installed").touch()
    # A module's packages are looked for beside it.
    for source in (SCRIPTS / "checks.mjs", SCRIPTS / script):
        shutil.copy(source, folder)
    run(["node", str(folder / script)], folder, server, said)


QUESTIONS = [
    ("Question: Is the sky blue?\nAnswer:", [" yes", " no", " I do not know"]),
    ("Find all .txt files\nfind . -name", [" '*.txt'", ' "*.txt" -type f', " *.md"]),
    ("SELECT name FROM", [" people WHERE age > 30", " table", " users;"]),
    ("The court held that the", [" appeal is dismissed.", " defendant shall pay", " plaintiff"]),
    ("How many points did Ferrari score?", [" SELECT points FROM table", " 133", " 26."]),
    ("What is 12 times 7?", [" 84", " 12 * 7 = 84", " 19"]),
    ("def add(a, b):\n    return", [" a + b", " a - b", " add(a, b)"]),
]


def expected() -> list[tuple[str, str, float, bool]]:
    """Log-likelihoods of the answers by transformers in float32."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_POOL / "base")
    model = AutoModelForCausalLM.from_pretrained(DEMO_POOL / "base", dtype=torch.float32).eval()
    rows, ends = [], 0
    for context, answers in QUESTIONS:
        head = len(tokenizer(context, add_special_tokens=False)["input_ids"])
        for answer in answers:
            ids = tokenizer(context + answer, add_special_tokens=False)["input_ids"]
            with torch.inference_mode():
                scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            best = scores.argmax(-1).tolist()
            total = sum(float(scores[at - 1, ids[at]]) for at in range(head, len(ids)))
            rows.append((context, answer, total, best[head - 1 : -1] == ids[head:]))
            ends += best[-1] in (tokenizer.eos_token_id, model.generation_config.eos_token_id)
    # Where the next token is the end, a server that leaves its entry out moves every sum by one token.
    assert ends > 0
    return rows
