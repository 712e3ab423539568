"""The extension `loramux` of an answer, as types: where it comes from."""

from typing import NotRequired

# pydantic reads that of `typing` from Python 3.12 on.
from typing_extensions import TypedDict


class ScoredExpert(TypedDict):
    """An expert with its share of the blend, null where each token has its own; the router's numbers are null
    where nothing was routed."""

    id: str
    weight: float | None
    similarity: float | None
    probability: float | None
    score: float | None


class Route(TypedDict):
    """How the experts of an answer were chosen."""

    strategy: str
    experts: list[ScoredExpert]
    fallback: bool
    truncated: bool


class BlendFields(TypedDict):
    """What the experts were merged into."""

    key: str
    method: str
    rank: int
    relative_error: float
    cached: bool


class BaseLoss(TypedDict):
    """What the base makes of the prompt, in nats a token; null for a prompt of one token."""

    loss: float | None


class MixtureLoss(BaseLoss):
    """What a mixture makes of it, and how much less that is than the base's."""

    gain: float | None


class ExpertLoss(MixtureLoss):
    """What the best expert alone, whole, makes of it."""

    expert: str


class Explained(TypedDict):
    """The loss of the prompt's own tokens, all but the first, under the base, the best expert and what
    served."""

    tokens: int
    base: BaseLoss
    top1: ExpertLoss | None
    blend: MixtureLoss


class Provenance(TypedDict):
    """The extension of every answer: route and blend, and in whole answers and last chunks the explanation,
    where it was asked for."""

    route: Route
    blend: BlendFields
    explain: NotRequired[Explained]
