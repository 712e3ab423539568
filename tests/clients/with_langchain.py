"""langchain-openai."""

import asyncio

from checks import API, ASK, TOO_LONG, check, finished, started
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

started("langchain-openai", "openai")
SETTINGS = {"base_url": API, "api_key": "none", "model": "auto", "max_retries": 0}
chat = ChatOpenAI(**SETTINGS, max_tokens=12, temperature=0)
responses = ChatOpenAI(**SETTINGS, max_tokens=12, temperature=0, use_responses_api=True)


@check
def chat_with_usage() -> None:
    answer = chat.invoke(ASK)
    assert answer.content
    assert answer.usage_metadata["output_tokens"] <= 12


@check
def stream() -> None:
    chunks = list(chat.stream(ASK, stream_usage=True))
    assert "".join(chunk.content for chunk in chunks) == chat.invoke(ASK).content
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) > 0


@check
def history_with_names() -> None:
    asked = [SystemMessage("Be short."), HumanMessage(ASK, name="ann")]
    assert isinstance(chat.invoke([*asked, chat.invoke(asked), HumanMessage("Why?")]), AIMessage)


@check
def batch_and_async() -> None:
    assert len(chat.batch([ASK, "Find all .txt files"])) == 2
    assert asyncio.run(chat.ainvoke(ASK)).content


@check
def logprobs() -> None:
    scored = chat.bind(logprobs=True, top_logprobs=2).invoke(ASK)
    assert len(scored.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2


@check
def the_route_is_in_the_metadata() -> None:
    raw = ChatOpenAI(**SETTINGS, max_tokens=4, include_response_headers=True).invoke(ASK)
    assert "=" in raw.response_metadata["headers"]["x-loramux-experts"]


@check
def own_mixture() -> None:
    routing = {"routing": {"top_m": 1}}
    assert ChatOpenAI(**SETTINGS, max_tokens=4, extra_body=routing).invoke(ASK).content is not None


@check
def completions() -> None:
    assert OpenAI(**SETTINGS, max_tokens=5, temperature=0).invoke("The capital of")


@check
def responses_api() -> None:
    answer = responses.invoke(ASK)
    assert answer.text == chat.invoke(ASK).content
    assert "".join(chunk.text for chunk in responses.stream(ASK)) == answer.text


@check
def embeddings() -> None:
    encoder = OpenAIEmbeddings(**SETTINGS, check_embedding_ctx_length=False)
    first, second = encoder.embed_documents(["a card payment", "a film"])
    assert len(first) == len(second) > 10


@check
def an_overflow_is_recognised() -> None:
    try:
        chat.invoke(TOO_LONG)
    except ContextOverflowError:
        return
    raise AssertionError("nothing was raised")


finished()
