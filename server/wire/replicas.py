"""Administration of replicas: the request, and the answers as types."""

from typing import Literal

from pydantic import Field

# pydantic reads that of `typing` from Python 3.12 on.
from typing_extensions import TypedDict

from loramux.server.wire.strict import StrictModel


class DrainReplicaRequest(StrictModel):
    """The replica by its number."""

    replica: int = Field(ge=0)


class ReplicaCard(TypedDict):
    """One replica."""

    replica: int
    up: bool
    pid: int | None
    sequences: int
    restarts: int
    moved_sequences: int


class ReplicaList(TypedDict):
    """All of them; none where the server generates itself."""

    object: Literal["list"]
    data: list[ReplicaCard]


class Drained(TypedDict):
    """The replica whose work went on elsewhere."""

    replica: int
    drained: Literal[True]
