"""What is asked of one server that generates in place of this process."""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Protocol

from loramux.server.engine.protocol import Event, Work


@dataclass(frozen=True, slots=True)
class BackendFacts:
    """What a backend says of itself.

    Attributes:
        base: the id that its base is asked for by.
        root: what it says the base was loaded from; empty where it does not say.
        max_context: tokens of prompt and answer together.
        adapters: the adapters that are loaded now: name -> where each was read from.
    """

    kind: str
    version: str
    base: str
    root: str
    max_context: int
    adapters: Mapping[str, str]


class Backend(Protocol):
    """One server. Opened on the event loop that uses it.

    Every method raises `BackendDown` when it cannot be reached and `BackendError` when it refuses.
    """

    @property
    def url(self) -> str: ...

    async def open(self) -> None:
        """Make connections possible."""
        ...

    async def close(self) -> None:
        """End all connections."""
        ...

    async def alive(self) -> None:
        """Nothing, where it answers."""
        ...

    async def facts(self) -> BackendFacts:
        """What it is, and what it has loaded."""
        ...

    async def tokens(self, text: str) -> list[int]:
        """A text in its vocabulary, nothing added."""
        ...

    def can_resume(self, work: Work) -> bool:
        """Whether a sequence that broke off elsewhere goes on here with `answered` as it would have there."""
        ...

    def stream(self, work: Work, mixture: Mapping[str, object]) -> AsyncGenerator[Event]:
        """Events of one sequence, as an engine's; closing it aborts the sequence there.

        `mixture` are the fields of the request that say what is applied to the base.

        Raises:
            BlendForgotten: before the first event.
        """
        ...


class AdapterBackend(Backend, Protocol):
    """One that reads adapters from directories while it runs."""

    async def load(self, name: str, path: str) -> None:
        """Have the adapter of that directory served under `name`; one that is there already is left."""
        ...

    async def unload(self, name: str) -> None:
        """Serve no such name any more; running sequences keep it."""
        ...
