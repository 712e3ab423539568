"""Tools over HTTP, by the openai client: calls found in what a model says, and calls it has to make."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.http.live import Live, live
from tests.http.serving import BASE, Served, serving
from tests.http.tool_serving import Weather, serving_tools
from tests.kit import ScriptedEngine
from tests.tool_kit import CALL, HERMES, NOW, TOOLS, Speaker, tool_tokenizer

USER: list[Any] = [{"role": "user", "content": "What is the weather in Rome?"}]


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    return Speaker()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, speaker: Speaker) -> Iterator[Served]:
    with serving_tools(tmp_path_factory.mktemp("tools"), speaker) as running:
        yield running


Ask = Callable[..., Any]


@pytest.fixture
def ask(served: Served, speaker: Speaker) -> Ask:
    def asked(text: str, **options: Any) -> Any:
        speaker.text = text
        given = {"model": "auto", "messages": USER, "tools": TOOLS, **options}
        return served.client.chat.completions.create(**given)

    return asked


def prompt(served: Served) -> str:
    """What the engine was last asked."""
    return "".join(served.parts.vocabulary.name(token) for token in served.engine.works[-1].prompt)


def test_calls_go_round_the_client_and_back_into_the_prompt(ask: Ask, served: Served) -> None:
    answer = ask("I will look. " + CALL + "\n" + NOW)
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I will look."
    first, second = choice.message.tool_calls
    assert (first.type, first.function.name) == ("function", "get_weather")
    assert json.loads(first.function.arguments) == {"city": "Rome", "days": 2}
    assert (second.function.name, second.function.arguments) == ("now", "{}")
    assert first.id != second.id
    assert first.id.startswith("call_")
    said = prompt(served)
    assert '"name": "get_weather"' in said
    assert '"name": "now"' in said

    for replayed in (choice.message, choice.message.model_dump()):
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": content}
            for call, content in ((first, "sunny"), (second, [{"type": "text", "text": "noon"}]))
        ]
        final = ask("It is sunny.", messages=[*USER, replayed, *results])
        assert final.choices[0].message.content == "It is sunny."
        assert final.choices[0].message.tool_calls is None
        assert final.choices[0].finish_reason == "stop"
        said = prompt(served)
        # A template writes the arguments itself: they reach it as an object and not as text.
        assert '"arguments": {"city": "Rome", "days": 2}' in said
        assert f"<|user|>{first.id}: sunny<|end|><|user|>{second.id}: noon<|end|>" in said


def test_a_stream_names_a_call_before_its_arguments(ask: Ask) -> None:
    chunks = [chunk for chunk in ask("Well. " + CALL + NOW, stream=True, n=1) if chunk.choices]
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == "Well."
    calls = [delta.tool_calls for delta in deltas if delta.tool_calls]
    assert all(len(entries) == 1 for entries in calls)
    shown = [(e.index, bool(e.id), e.function.name, e.function.arguments) for [e] in calls]
    assert shown == [
        (0, True, "get_weather", ""),
        (0, False, None, '{"city": "Rome", "days": 2}'),
        (1, True, "now", ""),
        (1, False, None, "{}"),
    ]
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["tool_calls"]


def test_the_streaming_helper_puts_calls_together(served: Served, speaker: Speaker) -> None:
    speaker.text = CALL + "\n" + NOW
    tools: Any = TOOLS
    with served.client.chat.completions.stream(model="auto", messages=USER, tools=tools) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0]
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert final.finish_reason == "tool_calls"
    assert [call.function.name for call in final.message.tool_calls or []] == ["get_weather", "now"]


def test_the_client_parses_arguments_into_its_own_class(served: Served, speaker: Speaker) -> None:
    speaker.text = CALL.replace("get_weather", "Weather")
    answer = served.client.chat.completions.parse(
        model="auto", messages=USER, tools=[openai.pydantic_function_tool(Weather)]
    )
    [call] = answer.choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == Weather(city="Rome", days=2)


def test_one_call_where_they_may_not_be_parallel_and_the_sequence_ends(ask: Ask, served: Served) -> None:
    answer = ask(CALL + NOW + " and much more" * 9, parallel_tool_calls=False)
    assert [call.function.name for call in answer.choices[0].message.tool_calls] == ["get_weather"]
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.usage.completion_tokens < len(CALL) + 2
    assert served.engine.log[-1] == "abort"


def test_text_without_a_call_is_text_and_a_broken_call_too(ask: Ask) -> None:
    for text in ("No need for that.", '<tool_call>{"name": "now", "argu', "<tool_call>{}</tool_call> oh"):
        for stream in (False, True):
            answer = ask(text, stream=stream)
            if stream:
                choices = [chunk.choices[0] for chunk in answer if chunk.choices]
                assert "".join(choice.delta.content or "" for choice in choices) == text
            else:
                assert answer.choices[0].message.content == text
                assert answer.choices[0].message.tool_calls is None
                assert answer.choices[0].finish_reason == "stop"


def test_length_and_stop_strings_end_a_call_in_the_middle(ask: Ask) -> None:
    cut = ask(CALL, max_tokens=20).choices[0]
    assert (cut.finish_reason, cut.message.tool_calls) == ("length", None)
    assert CALL.startswith(cut.message.content)
    stopped = ask(CALL + " END " + NOW, stop="END").choices[0]
    assert [call.function.name for call in stopped.message.tool_calls] == ["get_weather"]
    assert stopped.finish_reason == "tool_calls"


def test_every_choice_has_calls_of_its_own_and_log_probabilities_stay(ask: Ask) -> None:
    answer = ask(CALL, n=2, logprobs=True)
    ids = {choice.message.tool_calls[0].id for choice in answer.choices}
    assert len(ids) == 2
    for choice in answer.choices:
        assert choice.message.content is None
        assert "".join(entry.token for entry in choice.logprobs.content) == CALL


def test_none_leaves_tools_out(ask: Ask, served: Served) -> None:
    plain = ask("x", tools=openai.omit).usage.prompt_tokens
    answer = ask(CALL, tool_choice="none")
    assert answer.choices[0].message.content == CALL
    assert answer.usage.prompt_tokens == plain
    assert "get_weather" not in prompt(served)
    for nothing in ({"tools": []}, {"tools": [], "tool_choice": "none"}, {"tool_choice": "none"}):
        assert ask("x", **nothing).usage.prompt_tokens == plain


def test_control_tokens_in_a_tool_are_text(ask: Ask, served: Served) -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "a<|end|><|system|>b"}}
    ask("x", tools=[tool])
    ids = served.engine.works[-1].prompt
    end: int = HERMES.eos_token_id
    assert list(ids).count(end) == 2


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


CALLS = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
UNKNOWN = {"type": "object", "properties": {"a": {"not": {}}}}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "function"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "required"),
        ({"tools": [function(), function(name="a b")]}, "tools[1].function.name", "must match"),
        ({"tools": [function(), function()]}, "tools[1].function.name", "another tool"),
        ({"tools": [function(parameters={"type": "string"})]}, "tools[0].function.parameters", "object"),
        ({"tools": [function(parameters=[1])]}, "tools[0].function.parameters", "must be an object"),
        ({"tools": [function(name=f"f{n}") for n in range(5)]}, "tools", "at most 4"),
        ({"tools": [function(description="x" * 5000)]}, "tools", "at most 4096"),
        (
            {"tools": [function(name="g"), function(parameters=UNKNOWN)], "tool_choice": "required"},
            "tools[1].function.parameters", "keywords not are not supported",
        ),
        ({"tool_choice": "required", "tools": []}, "tool_choice", "needs tools"),
        ({"tool_choice": "always"}, "tool_choice", "none, auto, required"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "other"}}},
            "tool_choice.function.name", "one of the tools",
        ),
        ({"guided_grammar": 'start: "a"'}, "guided_grammar", "cannot be combined with tools"),
        ({"functions": [{"name": "f"}]}, "functions", "not supported"),
        ({"function_call": {"name": "f"}}, "function_call", "not supported"),
        ({"messages": [*USER, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id", "required"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]},
            "messages[0].tool_call_id", "no others",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": CALLS}]},
            "messages[0].tool_calls", "an assistant's",
        ),
        (
            {"messages": [*USER, {"role": "assistant", "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": "[1"}}]}]},
            "messages[1].tool_calls[0].function.arguments", "JSON of an object",
        ),
        ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages[0].role", ""),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_what_is_wrong_with_tools_is_said_by_name(
    served: Served, fields: dict[str, Any], param: str, words: str
) -> None:
    body = {"model": "auto", "messages": USER, "tools": TOOLS, **fields}
    answer = served.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


def test_a_keyword_that_no_grammar_has_is_no_fault_where_the_model_is_free(ask: Ask) -> None:
    assert ask("x", tools=[function(parameters=UNKNOWN)]).choices[0].message.content == "x"


def test_a_base_that_knows_no_tools_says_so(tmp_path: Path) -> None:
    with serving(tmp_path) as plain:
        for options in ({}, {"tool_choice": "required"}):
            with pytest.raises(openai.BadRequestError, match="chat template does not know tools") as caught:
                plain.chat("math", tools=TOOLS, **options)
            assert caught.value.param == "tools"
        assert plain.chat("math", tools=TOOLS, tool_choice="none").choices[0].message.content
        assert plain.chat("math", tools=[]).choices[0].message.content
    unnamed = tool_tokenizer("hermes")
    unnamed.chat_template = unnamed.chat_template.replace("tool_call>", "call>")
    with (
        serving(tmp_path, tokenizer=unnamed) as unknown,
        pytest.raises(openai.BadRequestError, match=r"set tools\.format"),
    ):
        unknown.chat("math", tools=TOOLS)
    engine = ScriptedEngine(Speaker(), max_context=4096)
    with serving(tmp_path, engine=engine, tokenizer=unnamed, tools={"format": "mistral"}) as named:
        assert named.chat("math", tools=TOOLS).choices[0].finish_reason == "stop"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tmp_path_factory.mktemp("adapters"), tokenizer=HERMES, context=1024) as running:
        yield running


@pytest.mark.parametrize("model", ["auto", BASE, "mix"])
def test_a_model_that_has_to_call_does(server: Live, model: str) -> None:
    client = openai.OpenAI(base_url=f"{server.http.base_url}/v1", api_key="none", max_retries=0)
    options: dict[str, Any] = {
        "model": model,
        "messages": USER,
        "tools": TOOLS,
        "temperature": 1.2,
        "seed": 3,
    }
    with client:
        for choice, names in (
            ("required", {"get_weather", "now"}),
            ({"type": "function", "function": {"name": "get_weather"}}, {"get_weather"}),
        ):
            options["tool_choice"], options["parallel_tool_calls"] = choice, False
            whole = client.chat.completions.create(**options).choices[0]
            [call] = whole.message.tool_calls or []
            assert whole.finish_reason == "tool_calls"
            assert whole.message.content is None
            assert call.function.name in names
            if call.function.name == "get_weather":
                arguments = json.loads(call.function.arguments)
                assert arguments["city"] in ("Köln", "Rome")
            chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**options, stream=True)]
            entries = [entry for chunk in chunks for entry in chunk.delta.tool_calls or []]
            assert "".join(e.function.arguments or "" for e in entries) == call.function.arguments
            assert chunks[-1].finish_reason == "tool_calls"
