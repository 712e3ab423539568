"""llama-index-llms-openai-like."""

from checks import API, ASK, check, finished, started
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

started("llama-index-llms-openai-like", "openai")
SETTINGS = {"api_base": API, "api_key": "none", "model": "auto", "max_tokens": 12, "temperature": 0}
chat = OpenAILike(**SETTINGS, is_chat_model=True, context_window=2048, max_retries=0)
MESSAGES = [ChatMessage(role="system", content="Be short."), ChatMessage(role="user", content=ASK)]


@check
def chat_and_history() -> None:
    answer = chat.chat(MESSAGES)
    assert answer.message.content
    assert chat.chat([*MESSAGES, answer.message, ChatMessage(role="user", content="Why?")]).message.content


@check
def stream() -> None:
    assert "".join(part.delta for part in chat.stream_chat(MESSAGES)) == chat.chat(MESSAGES).message.content


@check
def completions() -> None:
    plain = OpenAILike(**SETTINGS, is_chat_model=False, context_window=2048)
    whole = plain.complete("The capital of").text
    assert whole
    assert "".join(part.delta for part in plain.stream_complete("The capital of")) == whole


finished()
