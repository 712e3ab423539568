"""pydantic-ai, over chats and over Responses."""

import asyncio

from checks import API, ASK, check, finished, started
from pydantic_ai import Agent
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


finished()
