"""The JSON of answers of `/v1/responses`, as types."""

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from loramux.server.wire.answers import ScoredChatToken
from loramux.server.wire.provenance import Provenance


class OutputText(TypedDict):
    """What was said; `logprobs` has entries where they were asked for."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ScoredChatToken]


class OutputMessage(TypedDict):
    """The message of a response."""

    id: str
    type: Literal["message"]
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"]
    content: list[OutputText]


class OutputCall(TypedDict):
    """A call that the client is to make; `arguments` is the JSON text of an object."""

    id: str
    type: Literal["function_call"]
    status: Literal["in_progress", "completed"]
    call_id: str
    name: str
    arguments: str


class OfferedTool(TypedDict):
    """A function that was offered."""

    type: Literal["function"]
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool


class ChosenTool(TypedDict):
    """The function that had to be called."""

    type: Literal["function"]
    name: str


class CachedTokens(TypedDict):
    """Input tokens that were found in the cache; writing them is not counted."""

    cached_tokens: int
    cache_write_tokens: int


class ReasoningTokens(TypedDict):
    """None here."""

    reasoning_tokens: int


class ResponseUsage(TypedDict):
    """Tokens counted, by the names of Responses."""

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class IncompleteDetails(TypedDict):
    """Why an answer has no end."""

    reason: Literal["max_output_tokens"]


class ResponseFailure(TypedDict):
    """Why a response failed in the middle of its stream."""

    code: str
    message: str


class Response(TypedDict):
    """A response, and beside it what was asked. Nothing is stored under its id."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: NotRequired[int]
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage | OutputCall]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, str | None]
    service_tier: Literal["default"]
    store: Literal[False]
    temperature: float
    text: dict[str, dict[str, Any]]
    tool_choice: Literal["none", "auto", "required"] | ChosenTool
    tools: list[OfferedTool]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None
    loramux: NotRequired[Provenance]


class ResponseEvent(TypedDict):
    """One event of a streamed response; which fields it has besides is told by its type."""

    type: Literal[
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added", "response.output_text.delta", "response.output_text.done",
        "response.content_part.done", "response.output_item.done",
        "response.function_call_arguments.delta", "response.function_call_arguments.done",
        "response.completed", "response.incomplete", "response.failed",
    ]  # fmt: skip
    sequence_number: int
    response: NotRequired[Response]
    output_index: NotRequired[int]
    content_index: NotRequired[int]
    item_id: NotRequired[str]
    item: NotRequired[OutputMessage | OutputCall]
    part: NotRequired[OutputText]
    delta: NotRequired[str]
    text: NotRequired[str]
    name: NotRequired[str]
    arguments: NotRequired[str]
    logprobs: NotRequired[list[ScoredChatToken]]
