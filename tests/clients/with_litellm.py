"""The SDK of litellm, by both of its ways to name a server of this kind."""

import litellm
from checks import API, ASK, TOO_LONG, check, finished, started

started("litellm", "openai")
TO = {"api_base": API, "api_key": "none", "num_retries": 0}
MESSAGES = [{"role": "user", "content": ASK}]


@check
def chat() -> None:
    for model in ("openai/auto", "hosted_vllm/auto"):
        answer = litellm.completion(model=model, messages=MESSAGES, max_tokens=12, temperature=0, **TO)
        assert answer.choices[0].message.content
        assert answer.usage.completion_tokens <= 12


@check
def stream() -> None:
    options = {"max_tokens": 12, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    chunks = list(litellm.completion(model="openai/auto", messages=MESSAGES, **options, **TO))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


@check
def history() -> None:
    first = litellm.completion(model="openai/auto", messages=MESSAGES, max_tokens=5, **TO).choices[0].message
    for replayed in (first, first.model_dump()):
        turns = [*MESSAGES, replayed, {"role": "user", "content": "Why?"}]
        assert litellm.completion(model="openai/auto", messages=turns, max_tokens=5, **TO).choices


@check
def completions() -> None:
    to = {"model": "text-completion-openai/auto", **TO}
    answer = litellm.text_completion(prompt="The capital", max_tokens=4, **to)
    assert answer.choices[0].text


@check
def responses() -> None:
    for model in ("openai/auto", "hosted_vllm/auto"):
        answer = litellm.responses(model=model, input=ASK, max_output_tokens=12, temperature=0, **TO)
        assert answer.output[0].content[0].text
    kinds = [event.type for event in litellm.responses(model="openai/auto", input=ASK, stream=True, **TO)]
    assert kinds[-1] in ("response.completed", "response.incomplete")


@check
def messages_of_anthropic() -> None:
    options = {"max_tokens": 12, "messages": MESSAGES}
    for model in ("openai/auto", "hosted_vllm/auto"):
        answer = litellm.anthropic.messages.create(model=model, **options, **TO)
        assert answer["content"][0]["text"]


@check
def embeddings() -> None:
    answer = litellm.embedding(model="openai/auto", input=["a card payment", "a film"], **TO)
    assert len(answer.data) == 2


@check
def an_overflow_is_recognised() -> None:
    for model in ("openai/auto", "hosted_vllm/auto"):
        try:
            litellm.completion(model=model, messages=[{"role": "user", "content": TOO_LONG}], **TO)
        except litellm.ContextWindowExceededError:
            continue
        raise AssertionError("nothing was raised")


finished()
