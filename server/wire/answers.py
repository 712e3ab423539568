"""The JSON of every answer, as types: what the document at `/openapi.json` says of them.

A field that an answer may lack is `NotRequired`; one that is there without a value is null.
"""

from typing import Any, Literal, NotRequired

# pydantic reads that of `typing` from Python 3.12 on.
from typing_extensions import TypedDict

from loramux.server.wire.provenance import Provenance, ScoredExpert

FinishReason = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]


class ErrorFields(TypedDict):
    """`param` is the path of the field at fault, `code` a stable word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """What every failure is answered with."""

    error: ErrorFields


class PromptDetails(TypedDict):
    """Prompt tokens that were found in the cache."""

    cached_tokens: int


class Usage(TypedDict):
    """Tokens counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TokenScore(TypedDict):
    """A token with its log-probability in nats."""

    token: str
    logprob: float
    bytes: list[int] | None


class ScoredChatToken(TokenScore):
    """A token of the answer, and the most probable ones in its place."""

    top_logprobs: list[TokenScore]


class ChatLogprobs(TypedDict):
    """One entry a token."""

    content: list[ScoredChatToken]
    refusal: None


class CalledFunction(TypedDict):
    """What is called; `arguments` are JSON text."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(TypedDict):
    """The answer of one choice; one that only calls has no content."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[ToolCall]]


class ChatChoice(TypedDict):
    """One of `n` answers."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason


class ChatCompletion(TypedDict):
    """A whole chat answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    loramux: Provenance


class CalledFunctionDelta(TypedDict):
    """The name comes first, then the arguments."""

    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """What a chunk adds to call `index` of a choice."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: CalledFunctionDelta


class ChatDelta(TypedDict):
    """What a chunk adds; the first of a choice names the role."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallDelta]]


class ChatChunkChoice(TypedDict):
    """A piece of one choice; the last one says why it ended."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None


class ChatCompletionChunk(TypedDict):
    """One event of a streamed chat answer; the first has `loramux`. The stream ends with `data: [DONE]`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]
    loramux: NotRequired[Provenance]


class CompletionLogprobs(TypedDict):
    """One entry a token in every list; the first token of an echoed prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One of the answers, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(TypedDict):
    """A completion, whole, or one event of a stream; of these the first has `loramux`, the last `usage`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]
    loramux: NotRequired[Provenance]


class EmbeddedText(TypedDict):
    """A unit vector: a list of numbers, or with `encoding_format: base64` its float32 numbers as bytes."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(TypedDict):
    """Tokens counted by the encoder."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(TypedDict):
    """One vector a text, in their order; `model` is the encoder's id."""

    object: Literal["list"]
    data: list[EmbeddedText]
    model: str
    usage: EmbeddingsUsage


class ModelCard(TypedDict):
    """What `model` may be; `root` is what it is made from, `parent` the base it sits on."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    loramux: NotRequired[dict[str, Any]]


class ModelList(TypedDict):
    """Everything that `model` may be."""

    object: Literal["list"]
    data: list[ModelCard]


class Expert(TypedDict):
    """What an expert is for and worth; losses are nats per answer token on held-out rows of its own kind."""

    id: str
    description: str
    top_terms: list[str]
    examples: list[str]
    rows: int
    held_out_rows: int | None
    base_loss: float | None
    expert_loss: float | None
    gain: float | None
    routed: float | None
    routable: bool
    route_from: NotRequired[Literal["pool", "examples"]]


class Place(TypedDict):
    """Where something lies on the map."""

    x: float
    y: float


class ExpertPlace(Place):
    """Where an expert's centroid lies on the map."""

    id: str


class ExpertMap(TypedDict):
    """Centroids on their first two principal components, and the share of variance that each shows."""

    explained: list[float]
    experts: list[ExpertPlace]
    prompt: NotRequired[Place]


class ExpertList(TypedDict):
    """The experts, and the map of those that can be routed to."""

    object: Literal["list"]
    base: str
    data: list[Expert]
    map: ExpertMap


class Decision(TypedDict):
    """The router's whole decision."""

    strategy: str
    policy: str
    temperature: float
    threshold: float
    experts: list[ScoredExpert]
    candidates: list[ScoredExpert]
    fallback: bool
    truncated: bool
    margin: float | None
    entropy: float | None
    reason: str
    map: NotRequired[ExpertMap]


class Tokenized(TypedDict):
    """Token ids of a text or chat."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(TypedDict):
    """The text of token ids."""

    prompt: str


class Adapter(TypedDict):
    """An expert or sparse model that is loaded."""

    id: str
    kind: str
    content_hash: str
    rank: int
    modules: int
    bytes: int
    resident: NotRequired[bool]
    routable: NotRequired[bool]
    route_from: NotRequired[Literal["pool", "examples"]]
    truncated_examples: NotRequired[int]


class AdapterList(TypedDict):
    """All of them."""

    object: Literal["list"]
    data: list[Adapter]


class Unloaded(TypedDict):
    """The expert that is gone."""

    id: str
    unloaded: Literal[True]


class Status(TypedDict):
    """`ok` or `ready`."""

    status: str


class Version(TypedDict):
    """As vLLM says it."""

    version: str
