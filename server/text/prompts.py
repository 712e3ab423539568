"""Text and chats into token ids, within the context of the base."""

import asyncio
import copy
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import jinja2

from loramux.server.errors import RequestError
from loramux.server.text.template import EFFORT, Value, variables
from loramux.server.text.vocabulary import Vocabulary

INLINE_CHARACTERS = 16_384
NO_VARIABLES: Mapping[str, Value] = MappingProxyType({})

Result = TypeVar("Result")
#: `role`, `content`, and what else a chat template reads of a message: `name`, `tool_calls`, `tool_call_id`.
Turn = Mapping[str, Any]


class ChatTokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    chat_template: Any
    eos_token_id: int | None

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, Any]:
        """`input_ids` of a text."""
        ...

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any:
        """Render, and tokenize when asked."""
        ...

    def decode(self, token_ids: Sequence[int]) -> Any:
        """Ids back to text."""
        ...


class Prompts:
    """Tokenizes prompts, short ones at once and long ones in a thread, so that they stall nobody."""

    def __init__(self, tokenizer: ChatTokenizer, vocabulary: Vocabulary, max_context: int) -> None:
        self._tokenizer = tokenizer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._vocabulary = vocabulary
        self.max_context = max_context

    async def text(
        self, text: str, *, param: str = "prompt", add_special_tokens: bool = True
    ) -> tuple[int, ...]:
        """Token ids of a plain text.

        Raises:
            RequestError: longer than the context can hold, whatever its tokens are.
        """
        self._refuse_hopeless(text, param)

        def encode(tokenizer: ChatTokenizer) -> tuple[int, ...]:
            return tuple(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

        return await self._run(encode, len(text))

    async def chat(
        self,
        messages: Sequence[Turn],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Value] = NO_VARIABLES,
        tools: Sequence[Mapping[str, Any]] = (),
        param: str = "messages",
    ) -> tuple[int, ...]:
        """Token ids of a chat through the base's template, which sees the tools where there are any.

        Control tokens that a client writes into a message are tokenized as ordinary text: only the template
        can open or end a turn.

        Raises:
            RequestError: no template, the template refuses the messages, or far over the context.
        """
        if not self._tokenizer.chat_template:
            raise RequestError("the base has no chat template; use /v1/completions", code="no_chat_template")
        conversation = [
            {**turn, "role": "system"} if turn["role"] == "developer" else dict(turn) for turn in messages
        ]
        offered: dict[str, Any] = {"tools": [dict(tool) for tool in tools]} if tools else {}
        text = "".join(turn["content"] for turn in conversation)
        length = len(text) + len(str(offered))
        self._refuse_hopeless(text, param)

        def render(tokenizer: ChatTokenizer) -> tuple[int, ...]:
            try:
                ids = tokenizer.apply_chat_template(
                    conversation,
                    add_generation_prompt=add_generation_prompt,
                    sanitize_control_tokens=True,
                    return_dict=False,
                    **variables,
                    **offered,
                )
            except jinja2.TemplateError as error:
                problem = f"the chat template refused the messages: {error}"
                raise RequestError(problem, param=param, code="template_error") from None
            except Exception as error:
                # A template is a small program, which may raise any of Python's errors about these messages.
                problem = f"the chat template cannot render the messages: {type(error).__name__}: {error}"
                raise RequestError(problem, param=param, code="template_error") from None
            return tuple(ids)

        return await self._run(render, length)

    def variables(
        self, kwargs: Mapping[str, Value], effort: str | None, effort_param: str = EFFORT
    ) -> dict[str, Value]:
        """What the client gives the template beside the messages; see `template.variables`.

        Raises:
            RequestError: the template does not read it.
        """
        if not kwargs and effort is None:
            return {}
        tokenizer = self._tokenizer
        return variables(tokenizer.chat_template, tokenizer.apply_chat_template, kwargs, effort, effort_param)

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """Token ids back to text, special tokens by name.

        Raises:
            RequestError: an id outside the vocabulary.
        """
        self.check_ids(tokens, "tokens")

        def decode(tokenizer: ChatTokenizer) -> str:
            return str(tokenizer.decode(tokens))

        return await self._run(decode, len(tokens))

    def check_ids(self, tokens: Sequence[int], param: str) -> None:
        """Raises `RequestError` when an id is outside the vocabulary."""
        size = self._vocabulary.size
        if tokens and max(tokens) >= size:
            raise RequestError(
                f"{param}: token id {max(tokens)} is outside the vocabulary of {size}",
                param=param,
                code="invalid_value",
            )

    def room(
        self,
        prompt: int,
        asked: int | None,
        param: str,
        *,
        default: int | None = None,
        limit: str = "max_tokens",
    ) -> int:
        """Tokens that may be generated after `prompt` tokens; `limit` is the field that asked for so many.

        Raises:
            RequestError: the prompt leaves no room, or less than was asked for; the message has the numbers.
        """
        left = self.max_context - prompt
        if left < (0 if asked == 0 else 1):
            raise self._too_long(prompt, param)
        if asked is None:
            return left if default is None else min(left, default)
        if asked > left:
            raise RequestError(
                f"{self._overflow()} The prompt is too long for what was asked: {prompt} prompt tokens and "
                f"{limit} {asked} are {prompt + asked} together; the context holds {self.max_context}",
                param=limit,
                code="context_length_exceeded",
            )
        return asked

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Callable[[ChatTokenizer], Result], length: int) -> Result:
        if length <= INLINE_CHARACTERS:
            return work(self._tokenizer)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, work, self._own_tokenizer)

    @cached_property
    def _own_tokenizer(self) -> ChatTokenizer:
        """The thread's: fast tokenizers may not be used from two threads at a time. Made with the first long
        text, since it takes as much memory as the other."""
        return copy.deepcopy(self._tokenizer)

    def _refuse_hopeless(self, text: str, param: str) -> None:
        """Tokenizing megabytes only to say that they are too long would cost everyone else's time."""
        least = len(text) // max(1, self._vocabulary.longest)
        if least > self.max_context:
            raise self._too_long(least, param, "at least ")

    def _overflow(self) -> str:
        """The words that client libraries look for to tell this error from others."""
        return f"This model's maximum context length is {self.max_context} tokens."

    def _too_long(self, tokens: int, param: str, about: str = "") -> RequestError:
        return RequestError(
            f"{self._overflow()} The prompt is too long: {param} has {about}{tokens} tokens; "
            f"the context holds {self.max_context}, answer included",
            param=param,
            code="context_length_exceeded",
        )
