"""The real OpenAI client against a real socket."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from loramux.server.engine.protocol import EngineError, Work
from tests.http.serving import BASE, EXPERTS, TOKENIZER, Served, serving
from tests.kit import ScriptedEngine, saying, seeded


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("pool")) as running:
        yield running


def test_models_lists_auto_the_base_and_the_experts(served: Served) -> None:
    models = {model.id: model for model in served.client.models.list()}
    assert list(models) == ["auto", BASE, *EXPERTS]
    assert models["math"].model_dump()["parent"] == BASE
    assert served.client.models.retrieve("law").id == "law"


def test_chat(served: Served) -> None:
    answer = served.chat("math math code", max_tokens=50)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.content == "Hello, world."
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.system_fingerprint == "loramux-test"
    assert answer.usage.completion_tokens == 13
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 13


def test_the_answer_says_how_it_was_routed(served: Served) -> None:
    raw = served.client.chat.completions.with_raw_response.create(
        model="auto", messages=[{"role": "user", "content": "math math code"}]
    )
    assert raw.headers["x-loramux-experts"] == "math=0.67,code=0.33"
    loramux = raw.parse().model_dump()["loramux"]
    assert [(e["id"], e["weight"], e["score"]) for e in loramux["route"]["experts"]] == [
        ("math", 0.67, 2.0),
        ("code", 0.33, 1.0),
    ]
    assert loramux["route"]["strategy"] == "hybrid"
    assert not loramux["route"]["fallback"]
    assert not loramux["route"]["truncated"]
    assert set(loramux["blend"]) == {"key", "method", "rank", "relative_error", "cached"}
    assert (loramux["blend"]["method"], loramux["blend"]["rank"]) == ("exact", 8)


def test_routing_reads_the_last_user_message(served: Served) -> None:
    served.client.chat.completions.create(
        model="auto",
        messages=[
            {"role": "user", "content": "law"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": [{"type": "text", "text": "ma"}, {"type": "text", "text": "th"}]},
        ],
    )
    assert served.router.asked[-1] == "math"


def test_what_no_expert_knows_falls_back_to_the_base(served: Served) -> None:
    raw = served.client.chat.completions.with_raw_response.create(
        model="auto", messages=[{"role": "user", "content": "weather"}]
    )
    loramux = raw.parse().model_dump()["loramux"]
    assert loramux["route"]["fallback"]
    assert loramux["route"]["experts"] == []
    assert raw.headers["x-loramux-experts"] == ""
    assert served.engine.works[-1].adapter is None


@pytest.mark.parametrize(("model", "header"), [("law", "law=1"), (BASE, "")])
def test_a_model_by_name_is_not_routed(served: Served, model: str, header: str) -> None:
    asked = len(served.router.asked)
    raw = served.client.completions.with_raw_response.create(model=model, prompt="math")
    assert raw.headers["x-loramux-experts"] == header
    assert len(served.router.asked) == asked
    assert raw.parse().model == model


def test_the_clients_own_mixture(served: Served) -> None:
    lora = [{"id": "math", "scale": 0.7}, {"id": "law", "scale": -0.25}]
    answer = served.chat("code", extra_body={"lora": lora}).model_dump()["loramux"]
    assert answer["route"]["strategy"] == "given"
    assert {e["id"]: e["weight"] for e in answer["route"]["experts"]} == {"math": 0.7, "law": -0.25}
    assert answer["route"]["experts"][0]["similarity"] is None
    again = served.chat("code", extra_body={"lora": lora[::-1]}).model_dump()["loramux"]
    assert again["blend"]["key"] == answer["blend"]["key"]
    assert again["blend"]["cached"]


def test_routing_options_reach_the_router(served: Served) -> None:
    answer = served.chat(
        "math law code", extra_body={"routing": {"top_m": 1, "strategy": "similarity", "merge": "svd"}}
    )
    assert len(answer.model_dump()["loramux"]["route"]["experts"]) == 1
    assert answer.model_dump()["loramux"]["route"]["strategy"] == "similarity"


def test_a_stream_says_the_same_as_the_whole_answer(served: Served) -> None:
    chunks = list(served.chat("math", stream=True, stream_options={"include_usage": True}))
    first, *middle, last = chunks
    assert first.choices[0].delta.role == "assistant"
    assert first.model_dump()["loramux"]["route"]["experts"][0]["id"] == "math"
    assert all("loramux" not in (chunk.model_extra or {}) for chunk in [*middle, last])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in middle) == "Hello, world."
    assert [chunk.choices[0].finish_reason for chunk in middle if chunk.choices[0].finish_reason] == ["stop"]
    assert all(chunk.usage is None for chunk in [first, *middle])
    assert last.choices == []
    assert last.usage == served.chat("math").usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_without_include_usage_has_no_usage(served: Served) -> None:
    chunks = list(served.chat(stream=True))
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_stream_ends_with_done_and_event_stream_headers(served: Served) -> None:
    with served.http.stream(
        "POST", "/v1/completions", json={"model": "law", "prompt": "a", "stream": True}
    ) as answer:
        body = answer.read().decode()
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-loramux-experts"] == "law=1"
    assert body.endswith("data: [DONE]\n\n")


def test_max_tokens_ends_with_length(served: Served) -> None:
    for option in ("max_tokens", "max_completion_tokens"):
        options: dict[str, Any] = {option: 5}
        answer = served.chat(**options)
        assert answer.choices[0].message.content == "Hello"
        assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["wor", ["xyz", ", wo", "world"]])
def test_stop_strings_end_the_answer_and_are_not_in_it(served: Served, stop: str, stream: bool) -> None:
    answer = served.chat(stop=stop, stream=stream)
    if stream:
        chunks = list(answer)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        finish = chunks[-1].choices[0].finish_reason
    else:
        text, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert (text, finish) == ("Hello, " if stop == "wor" else "Hello", "stop")


def test_a_stop_token_ends_the_answer(served: Served) -> None:
    comma = TOKENIZER(",", add_special_tokens=False)["input_ids"]
    assert served.chat(extra_body={"stop_token_ids": comma}).choices[0].message.content == "Hello"


def test_chat_logprobs(served: Served) -> None:
    choice = served.chat(logprobs=True, top_logprobs=2, max_tokens=2).choices[0]
    content = choice.logprobs.content
    assert [entry.token for entry in content] == ["H", "e"]
    assert bytes(content[0].bytes) == b"H"
    assert content[0].logprob == -0.5
    assert [entry.logprob for entry in content[0].top_logprobs] == [-0.5, -1.5]
    streamed = served.chat(logprobs=True, top_logprobs=2, max_tokens=2, stream=True)
    entries = [e for chunk in streamed for c in chunk.choices if c.logprobs for e in c.logprobs.content]
    assert entries == content


def test_completion_with_echo_and_logprobs(served: Served) -> None:
    answer = served.client.completions.create(model=BASE, prompt="ab", max_tokens=2, echo=True, logprobs=1)
    choice = answer.choices[0]
    assert choice.text == "abHe"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["a", "b", "H", "e"]
    assert choice.logprobs.token_logprobs == [None, -0.5, -0.5, -0.5]
    assert choice.logprobs.text_offset == [0, 1, 2, 3]
    assert choice.logprobs.top_logprobs == [None, {"b": -0.5}, {"H": -0.5}, {"e": -0.5}]


def test_no_text_ends_a_line_of_a_stream(served: Served) -> None:
    ends = "a\x85b\u2028c\u2029d\x0b\x0ce"
    body = {"model": BASE, "prompt": ends, "max_tokens": 1, "echo": True, "stream": True}
    lines = served.http.post("/v1/completions", json=body).text.splitlines()
    assert {line[:6] for line in lines} == {"", "data: "}
    sent = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(choice["text"] for chunk in sent for choice in chunk["choices"]).startswith(ends)


def test_scoring_a_prompt_without_generating(served: Served) -> None:
    answer = served.client.completions.create(model=BASE, prompt="abc", max_tokens=0, echo=True, logprobs=0)
    assert answer.choices[0].text == "abc"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0
    assert served.engine.works[-1].prompt_logprobs == 0


def test_several_prompts_and_choices_in_order(served: Served) -> None:
    ids = TOKENIZER("law", add_special_tokens=False)["input_ids"]
    answer = served.client.completions.create(model="auto", prompt=["math", "code"], n=2, max_tokens=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 12)
    assert served.router.asked[-1] == "math\ncode"
    whole = served.client.completions.create(model="auto", prompt=ids, max_tokens=3, echo=True)
    assert whole.choices[0].text == "lawHel"
    assert served.router.asked[-1] == "law"


def test_choices_of_a_seeded_request_differ_and_repeat(tmp_path: Path) -> None:
    with serving(tmp_path, engine=ScriptedEngine(seeded(TOKENIZER))) as served:
        first = [c.message.content for c in served.chat(n=4, seed=7).choices]
        assert len(set(first)) == 4
        assert [c.message.content for c in served.chat(n=4, seed=7).choices] == first
        assert served.chat(seed=7).choices[0].message.content == first[0]
        assert served.chat(seed=8).choices[0].message.content not in first
        streamed: dict[int, str] = {}
        for chunk in served.chat(n=4, seed=7, stream=True):
            for choice in chunk.choices:
                streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
        assert [streamed[index] for index in range(4)] == first


def test_sampling_reaches_the_engine(served: Served) -> None:
    served.chat(
        temperature=0.5,
        top_p=0.9,
        seed=-3,
        presence_penalty=1,
        frequency_penalty=-1.5,
        logit_bias={"5": -100, "7": 2.5},
        extra_body={"top_k": 40, "min_p": 0.05, "repetition_penalty": 1.2, "ignore_eos": True},
        user="someone",
        response_format={"type": "text"},
    )
    sampling = served.engine.works[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 40, 0.05)
    assert (sampling.seed, sampling.presence_penalty, sampling.frequency_penalty) == (-3, 1, -1.5)
    assert (sampling.repetition_penalty, sampling.ignore_eos) == (1.2, True)
    assert sampling.logit_bias == {5: -100, 7: 2.5}


def test_null_is_the_default(served: Served) -> None:
    absent = dict.fromkeys(["stop", "temperature", "tools", "n", "seed", "stream_options"])
    body = {"model": "auto", "messages": [{"role": "user", "content": "a"}], **absent}
    assert served.http.post("/v1/chat/completions", json=body).status_code == 200


def test_characters_of_several_tokens_arrive_whole(tmp_path: Path) -> None:
    text = "naïve 漢字 🙂 done"
    with serving(tmp_path, engine=ScriptedEngine(saying(TOKENIZER, text))) as served:
        parts = [chunk.choices[0].delta.content or "" for chunk in served.chat(stream=True)]
        assert "".join(parts) == text
        assert not any("�" in part for part in parts)
        cut = served.chat(max_tokens=len("naïve ".encode()) + 2).choices[0].message.content
        assert cut == "naïve "


def test_errors_arrive_as_the_clients_own_exceptions(served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        served.chat(model="nobody")
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as bad:
        served.chat(temperature=-1)
    assert bad.value.param == "temperature"
    assert bad.value.type == "invalid_request_error"


def test_a_full_queue_is_429_with_retry_after(tmp_path: Path) -> None:
    engine = ScriptedEngine(saying(TOKENIZER, "x"), max_waiting=0)
    with serving(tmp_path, engine=engine) as served:
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError) as full:
                served.chat("math", stream=stream)
            assert full.value.response.headers["retry-after"] == "3"
            assert full.value.code == "queue_full"


def test_a_failure_before_the_first_token_has_its_own_status(tmp_path: Path) -> None:
    def failing(work: Work) -> list[int]:
        raise EngineError("the generation step failed: no luck")

    with serving(tmp_path, engine=ScriptedEngine(failing)) as served:
        with pytest.raises(openai.InternalServerError, match="no luck"):
            served.chat("math")
        assert served.metric("loramux_requests_total", outcome="failed") == 1


def test_a_failure_in_the_middle_of_a_stream_is_an_error_event_and_no_finish(tmp_path: Path) -> None:
    engine = ScriptedEngine(saying(TOKENIZER, "Hello"), fail_after=3, failure=EngineError("step failed"))
    with serving(tmp_path, engine=engine) as served:
        with pytest.raises(openai.APIError, match="step failed"):
            list(served.chat("math", stream=True))
        answer = served.http.post(
            "/v1/completions", json={"model": "law", "prompt": "a", "stream": True, "n": 3}
        )
        assert "[DONE]" not in answer.text
        assert 'finish_reason":"stop' not in answer.text
        assert answer.text.rstrip().splitlines()[-1].startswith('data: {"error":')
        assert served.metric("loramux_requests_total", outcome="failed") == 2


def test_many_clients_at_once_get_their_own_answers(tmp_path: Path) -> None:
    with serving(tmp_path, engine=ScriptedEngine(seeded(TOKENIZER, 30))) as served:

        def ask(seed: int) -> tuple[str, str]:
            expert = EXPERTS[seed % 3]
            answer = served.chat(f"{expert} {seed}", seed=seed)
            assert answer.model_dump()["loramux"]["route"]["experts"][0]["id"] == expert
            return answer.choices[0].message.content, served.chat(expert, seed=seed).choices[
                0
            ].message.content

        with ThreadPoolExecutor(16) as pool:
            pairs = list(pool.map(ask, range(48)))
        assert all(first == again for first, again in pairs)
        assert len({first for first, _ in pairs}) == 48
        assert served.metric("loramux_requests_total", outcome="finished") == 96
