"""Traces of requests: nothing by default; OpenTelemetry's where they are asked for and its packages are
installed."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from loramux.server.errors import StartError
from loramux.server.job import Job


class Traces(Protocol):
    """Told when a request comes in, and when its job begins and ends."""

    def continued(self, headers: Mapping[str, str], request_id: str) -> AbstractContextManager[None]:
        """Around an HTTP request; its jobs belong to the trace that the headers name."""
        ...

    def request(self, job: Job) -> AbstractContextManager[None]:
        """Around a job; when it ends, so have all stages of its life."""
        ...

    def close(self) -> None:
        """Send what has not been sent. Blocks."""
        ...


class NoTraces:
    """Implements `Traces`."""

    def continued(self, headers: Mapping[str, str], request_id: str) -> AbstractContextManager[None]:  # noqa: ARG002
        return nullcontext()

    def request(self, job: Job) -> AbstractContextManager[None]:  # noqa: ARG002
        return nullcontext()

    def close(self) -> None:
        pass


NO_TRACES = NoTraces()


def make_traces(wanted: bool) -> Traces:
    """OpenTelemetry's, which is imported here and nowhere else, or none.

    Raises:
        StartError: its packages are not installed.
    """
    if not wanted:
        return NO_TRACES
    try:
        from loramux.server.otel import OtelTraces, exporting
    except ImportError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        raise StartError(
            f"traces: {error.name} is not installed; pip install 'loramux[otel]', or leave traces off"
        ) from None
    return OtelTraces(exporting())
