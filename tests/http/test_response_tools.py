"""Tools of `/v1/responses`, by the openai client: items of calls and of results, whole and as events."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from tests.http.live import Live, live
from tests.http.serving import BASE, Served
from tests.http.tool_serving import Weather, serving_tools
from tests.tool_kit import CALL, HERMES, NOW, TOOLS, Speaker

USER = "What is the weather in Rome?"
FLAT: list[Any] = [
    {"type": "function", "strict": None, "parameters": None, **tool["function"]} for tool in TOOLS
]
ARGUMENTS = '{"city": "Rome", "days": 2}'


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
        return served.client.responses.create(**{"model": "auto", "input": USER, "tools": FLAT, **options})

    return asked


def prompt(served: Served) -> tuple[int, ...]:
    """What the engine was last asked."""
    return tuple(served.engine.works[-1].prompt)


def test_calls_are_items_and_what_follows_is_the_chat_of_the_same(ask: Ask, served: Served) -> None:
    answer = ask("I will look. " + CALL + "\n" + NOW)
    assert answer.status == "completed"
    message, first, second = answer.output
    assert (message.type, answer.output_text) == ("message", "I will look.")
    assert (first.type, first.name, first.arguments) == ("function_call", "get_weather", ARGUMENTS)
    assert (second.type, second.name, second.arguments) == ("function_call", "now", "{}")
    assert {first.status, second.status} == {"completed"}
    assert len({first.call_id, second.call_id, first.id, second.id, message.id}) == 5
    assert [tool.name for tool in answer.tools] == ["get_weather", "now"]
    assert (answer.tool_choice, answer.parallel_tool_calls) == ("auto", True)
    offered = prompt(served)

    results = [
        {"type": "function_call_output", "call_id": first.call_id, "output": "sunny"},
        {
            "type": "function_call_output",
            "call_id": second.call_id,
            "output": [{"type": "input_text", "text": "noon"}],
        },
    ]
    dumped = [item.model_dump() for item in answer.output]
    assert None in dumped[1].values()  # what the client keeps has more fields than it was sent
    prompts = set()
    for replayed in (answer.output, dumped):
        final = ask("It is sunny.", input=[{"role": "user", "content": USER}, *replayed, *results])
        assert final.output_text == "It is sunny."
        assert [item.type for item in final.output] == ["message"]
        prompts.add(prompt(served))
    served.client.chat.completions.create(
        model="auto", tools=TOOLS, messages=[{"role": "user", "content": USER}]
    )  # type: ignore[arg-type]
    assert prompt(served) == offered
    calls: list[Any] = [
        {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in (first, second)
    ]
    served.client.chat.completions.create(
        model="auto",
        tools=TOOLS,  # type: ignore[arg-type]
        messages=[
            {"role": "user", "content": USER},
            {"role": "assistant", "content": "I will look.", "tool_calls": calls},
            {"role": "tool", "tool_call_id": first.call_id, "content": "sunny"},
            {"role": "tool", "tool_call_id": second.call_id, "content": "noon"},
        ],
    )
    assert prompts == {prompt(served)}


def test_a_stream_opens_and_closes_each_item(ask: Ask) -> None:
    events = list(ask("Well. " + CALL + NOW, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    call = [
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
        "output_item.done",
    ]  # fmt: skip
    texts = kinds.count("output_text.delta")
    assert texts > 2
    assert kinds == [
        "created", "in_progress", "output_item.added", "content_part.added",
        *["output_text.delta"] * texts,
        "output_text.done", "content_part.done", "output_item.done", *call, *call, "completed",
    ]  # fmt: skip
    assert [event.output_index for event in events if "output_item" in event.type] == [0, 0, 1, 1, 2, 2]
    added = next(event.item for event in events if event.type.endswith("added") and event.output_index == 1)
    assert (added.name, added.arguments, added.status) == ("get_weather", "", "in_progress")
    delta, *_ = (event for event in events if "arguments" in event.type)
    assert (delta.item_id, delta.delta) == (added.id, ARGUMENTS)
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert done == events[-1].response.output


def test_the_streaming_helper_puts_items_together(served: Served, speaker: Speaker) -> None:
    speaker.text = CALL + "\n" + NOW
    with served.client.responses.stream(model="auto", input=USER, tools=FLAT) as stream:
        found = [event for event in stream if event.type == "response.function_call_arguments.done"]
        final = stream.get_final_response()
    assert [event.arguments for event in found] == [ARGUMENTS, "{}"]
    assert [item.type for item in final.output] == ["function_call"] * 2
    assert final.output_text == ""


def test_the_client_parses_arguments_into_its_own_class(served: Served, speaker: Speaker) -> None:
    speaker.text = CALL.replace("get_weather", "Weather")
    answer = served.client.responses.parse(
        model="auto", input=USER, tools=[openai.pydantic_function_tool(Weather)]
    )
    [call] = answer.output
    assert call.type == "function_call"
    assert call.parsed_arguments == Weather(city="Rome", days=2)


def test_one_call_where_they_may_not_be_parallel(ask: Ask, served: Served) -> None:
    answer = ask(CALL + NOW + " and much more" * 9, parallel_tool_calls=False)
    assert [item.name for item in answer.output] == ["get_weather"]
    assert answer.parallel_tool_calls is False
    assert served.engine.log[-1] == "abort"


def test_text_after_a_call_is_another_message(ask: Ask) -> None:
    for stream in (False, True):
        found = ask("One. " + NOW + " Two.", stream=stream)
        answer = list(found)[-1].response if stream else found
        assert [item.type for item in answer.output] == ["message", "function_call", "message"]
        assert [item.content[0].text.strip() for item in answer.output[::2]] == ["One.", "Two."]
        assert len({item.id for item in answer.output}) == 3


def test_a_call_that_was_cut_is_text_of_an_incomplete_answer(ask: Ask) -> None:
    cut = ask(CALL, max_output_tokens=20)
    assert (cut.status, [item.type for item in cut.output]) == ("incomplete", ["message"])
    assert CALL.startswith(cut.output_text)
    after = ask(NOW + CALL, max_output_tokens=len(NOW) + 9)
    assert after.status == "incomplete"
    assert (after.output[0].type, after.output[0].status) == ("function_call", "completed")


def test_log_probabilities_are_those_of_the_text(ask: Ask) -> None:
    include = ["message.output_text.logprobs"]
    message, call = ask("Hm. " + CALL, include=include).output
    assert call.type == "function_call"
    assert "".join(one.token for one in message.content[0].logprobs).strip().startswith("Hm.")
    [alone] = ask(CALL, include=include).output
    assert alone.type == "function_call"


def test_none_leaves_tools_out(ask: Ask, served: Served) -> None:
    plain = ask("x", tools=openai.omit).usage.input_tokens
    answer = ask(CALL, tool_choice="none")
    assert (answer.output_text, answer.tool_choice) == (CALL, "none")
    assert answer.usage.input_tokens == plain
    assert ask("x", tools=[]).usage.input_tokens == plain


def tool(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "name": "f", **fields}


UNKNOWN = {"type": "object", "properties": {"a": {"not": {}}}}
CALLED = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "c"}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "function"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "required"),
        ({"tools": [tool(), tool(name="a b")]}, "tools[1].name", "must match"),
        ({"tools": [tool(), tool()]}, "tools[1].name", "another tool"),
        ({"tools": [tool(parameters={"type": "string"})]}, "tools[0].parameters", "object"),
        ({"tools": [tool(name=f"f{n}") for n in range(5)]}, "tools", "at most 4"),
        ({"tools": [tool(description="x" * 5000)]}, "tools", "at most 4096"),
        (
            {"tools": [tool(name="g"), tool(parameters=UNKNOWN)], "tool_choice": "required"},
            "tools[1].parameters", "keywords not are not supported",
        ),
        ({"tool_choice": "required", "tools": []}, "tool_choice", "needs tools"),
        ({"tool_choice": "always"}, "tool_choice", "none, auto, required"),
        ({"tool_choice": {"type": "function", "name": "other"}}, "tool_choice.name", "one of the tools"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice.type", "function"),
        ({"guided_grammar": 'start: "a"'}, "guided_grammar", "cannot be combined with tools"),
        ({"input": [CALLED | {"arguments": "[1"}]}, "input[0].arguments", "JSON of an object"),
        ({"input": [CALLED | {"call_id": ""}]}, "input[0].call_id", "at least 1"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id", "required"),
        ({"input": [RESULT]}, "input[0].output", "required"),
        ({"input": [RESULT | {"output": [{"type": "input_image"}]}]}, "input[0].output", "not supported"),
        ({"max_tool_calls": 3}, "max_tool_calls", "not supported"),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_what_is_wrong_is_said_by_name(
    served: Served, fields: dict[str, Any], param: str, words: str
) -> None:
    body = {"model": "auto", "input": USER, "tools": FLAT, **fields}
    answer = served.http.post("/v1/responses", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param, error
    assert words in error["message"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tmp_path_factory.mktemp("adapters"), tokenizer=HERMES, context=1024) as running:
        yield running


@pytest.mark.parametrize("model", ["auto", BASE])
def test_a_model_that_has_to_call_does(server: Live, model: str) -> None:
    client = openai.OpenAI(base_url=f"{server.http.base_url}/v1", api_key="none", max_retries=0)
    options: dict[str, Any] = {
        "model": model, "input": USER, "tools": FLAT, "temperature": 1.2, "parallel_tool_calls": False,
        "extra_body": {"seed": 3},
    }  # fmt: skip
    with client:
        for choice, names in (
            ("required", {"get_weather", "now"}),
            ({"type": "function", "name": "get_weather"}, {"get_weather"}),
        ):
            whole = client.responses.create(**options, tool_choice=choice)
            [call] = whole.output
            assert call.type == "function_call"
            assert call.name in names
            if call.name == "get_weather":
                assert json.loads(call.arguments)["city"] in ("Köln", "Rome")
            if isinstance(choice, dict):
                assert whole.tool_choice.name == "get_weather"
            *_, last = client.responses.create(**options, tool_choice=choice, stream=True)
            assert [item.arguments for item in last.response.output] == [call.arguments]
