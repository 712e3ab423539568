"""pydantic-ai, over chats and over Responses."""

import asyncio
from typing import Literal

from checks import API, ASK, check, finished, started
from pydantic import BaseModel, Field
from pydantic_ai import Agent, DeferredToolRequests, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

started("pydantic-ai-slim", "openai")
PROVIDER = OpenAIProvider(base_url=API, api_key="none")
SETTINGS = {"max_tokens": 12, "temperature": 0}
MODELS = {"chats": OpenAIChatModel, "responses": OpenAIResponsesModel}
AGENTS = {
    name: Agent(model("auto", provider=PROVIDER), instructions="Be short.", model_settings=SETTINGS)
    for name, model in MODELS.items()
}


@check
def text_and_history() -> None:
    for name, agent in AGENTS.items():
        first = agent.run_sync(ASK)
        assert first.output, name
        assert agent.run_sync("Why?", message_history=first.all_messages()).output, name


@check
def both_say_the_same() -> None:
    assert len({agent.run_sync(ASK).output for agent in AGENTS.values()}) == 1


@check
def stream() -> None:
    async def said(agent: Agent) -> str:
        async with agent.run_stream(ASK) as result:
            return "".join([text async for text in result.stream_text(delta=True)])

    for name, agent in AGENTS.items():
        assert asyncio.run(said(agent)), name


# An agent may not force its only functions on each step; here it is one step, by a field of the request.
CALLING = {
    "max_tokens": 80, "temperature": 0, "parallel_tool_calls": False,
    "extra_body": {"tool_choice": "required"},
}  # fmt: skip
Team = Literal["Ferrari", "McLaren"]


class Person(BaseModel):
    """Somebody who is named."""

    name: str = Field(min_length=1, max_length=20)
    age: int = Field(ge=0, le=150)


@check
def objects_by_a_call_and_by_a_format() -> None:
    settings = {"max_tokens": 200, "temperature": 0}
    for name, model in MODELS.items():
        for output in (ToolOutput(Person), NativeOutput(Person)):
            agent = Agent(
                model("auto", provider=PROVIDER), output_type=output, model_settings=settings, retries=0
            )
            assert isinstance(agent.run_sync(ASK).output, Person), (name, output)


def called(model: type) -> list[str]:
    """With what a function was called that had to be, before the model answered."""
    agent = Agent(model("auto", provider=PROVIDER), output_type=[str, DeferredToolRequests])
    teams: list[str] = []

    @agent.tool_plain(requires_approval=True)
    def look_up(team: Team) -> str:
        """Look up the points of a team."""
        teams.append(team)
        return "133"

    first = agent.run_sync(ASK, model_settings=CALLING)
    assert isinstance(first.output, DeferredToolRequests)
    answer = agent.run_sync(
        message_history=first.all_messages(),
        deferred_tool_results=first.output.build_results(approve_all=True),
        model_settings=SETTINGS,
    )
    assert answer.output
    return teams


@check
def a_function_is_called_and_answered() -> None:
    for name, model in MODELS.items():
        assert called(model) in (["Ferrari"], ["McLaren"]), name


finished()
