"""The openai client against the real engine on the demo pool."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM

from tests.e2e.conftest import Server

BASE = "loramux-demo-base"
QUESTION: list[Any] = [{"role": "user", "content": "How many points did Ferrari score in the 1998 season?"}]


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with server.openai() as opened:
        yield opened


def test_a_stream_says_what_the_whole_answer_says(client: OpenAI) -> None:
    options: Any = {
        "model": "auto",
        "messages": QUESTION,
        "max_tokens": 30,
        "temperature": 0.8,
        "seed": 11,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**options)
    chunks = list(
        client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    assert choices[-1].finish_reason == whole.choices[0].finish_reason
    streamed = [entry for c in choices if c.logprobs for entry in c.logprobs.content or []]
    complete = whole.choices[0].logprobs.content  # type: ignore[union-attr]
    assert [entry.token for entry in streamed] == [entry.token for entry in complete or []]
    for entry, other in zip(streamed, complete or [], strict=True):
        assert entry.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert len(entry.top_logprobs) == 2
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert "loramux" in (chunks[0].model_extra or {})


def test_choices_differ_and_a_seed_repeats_them(client: OpenAI) -> None:
    def texts(seed: int) -> list[str]:
        answer = client.completions.create(
            model="auto", prompt="The capital of", n=3, max_tokens=16, temperature=1.0, seed=seed
        )
        return [choice.text for choice in sorted(answer.choices, key=lambda choice: choice.index)]

    first = texts(3)
    assert len(set(first)) == 3
    assert texts(3) == first
    assert texts(4) != first


def test_a_stop_string_ends_the_answer_before_it(client: OpenAI) -> None:
    options: Any = {"model": "auto", "messages": QUESTION, "max_tokens": 40, "temperature": 0}
    plain = client.chat.completions.create(**options).choices[0].message.content or ""
    stop = plain[len(plain) // 2 : len(plain) // 2 + 3]
    answer = client.chat.completions.create(**options, stop=[stop]).choices[0]
    assert answer.message.content == plain[: plain.index(stop)]
    assert answer.finish_reason == "stop"


def test_penalties_change_a_greedy_answer(client: OpenAI) -> None:
    options: Any = {
        "model": "auto",
        "messages": QUESTION,
        "max_tokens": 24,
        "temperature": 0,
        "logprobs": True,
    }
    plain = client.chat.completions.create(**options, top_logprobs=0).choices[0]
    assert plain.message.content
    changed = client.chat.completions.create(
        **options, frequency_penalty=2.0, presence_penalty=2.0, extra_body={"repetition_penalty": 1.5}
    ).choices[0]
    assert changed.message.content != plain.message.content


def test_mistakes_are_named(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no-such-model"):
        client.chat.completions.create(model="no-such-model", messages=QUESTION)
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="auto", messages=QUESTION, extra_body={"colour": "red"})
    assert refused.value.param == "colour"
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model="auto", prompt=[7] * 3000)
    assert too_long.value.code == "context_length_exceeded"


def test_log_likelihoods_as_evaluation_harnesses_read_them(server: Server, pool_dir: Path) -> None:
    """lm-eval asks for one token more and cuts the last entry: an end token needs an entry."""
    model = AutoModelForCausalLM.from_pretrained(pool_dir / "base", dtype=torch.float32).eval()
    end = model.generation_config.eos_token_id
    questions = ["Why was my card payment declined?", "What is the capital of France?", "Who wrote Hamlet?"]
    ended = 0
    for question in questions:
        generated = server.post("/v1/completions", model=BASE, prompt=question, max_tokens=40, temperature=0)
        for text in (question, question + generated["choices"][0]["text"]):
            ids = server.post("/tokenize", prompt=text)["tokens"]
            asked = {"max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
            answer = server.post("/v1/completions", model=BASE, prompt=ids, **asked)
            found = answer["choices"][0]["logprobs"]["token_logprobs"]
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
            expected = [float(logits[at, token]) for at, token in enumerate(ids[1:])]
            assert len(found) == len(ids) + 1
            assert answer["usage"]["completion_tokens"] == 1
            assert found[1:-1] == pytest.approx(expected, abs=1e-3)
            assert found[-1] == pytest.approx(float(logits[-1].max()), abs=1e-3)
            ended += int(logits[-1].argmax()) in ([end] if isinstance(end, int) else end)
    assert ended
