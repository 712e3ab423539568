"""Traces as OpenTelemetry has them: a span for a request, and below it one for each stage of its life.

Where they go, how many are kept and what the service is called is said by the `OTEL_*` variables. Texts are
never in a span.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from itertools import pairwise

from opentelemetry import context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from loramux.server.job import Job, State

#: What a request does from the beginning of a state on.
STAGES = {
    State.RECEIVED: "route",
    State.ROUTED: "blend",
    State.MERGING: "lease",
    State.WAITING: "queue",
    State.PREFILL: "prefill",
    State.DECODE: "decode",
}
REQUEST_ID = "loramux.request_id"


def exporting() -> TracerProvider:
    """A provider that sends spans in batches, by OTLP over HTTP, on a thread of its own."""
    resource = Resource.create()
    if str(resource.attributes["service.name"]).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "loramux"}))
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class OtelTraces:
    """Implements `Traces`."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("loramux", version("loramux"))
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def continued(self, headers: Mapping[str, str], request_id: str) -> Iterator[None]:
        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        parent = self._propagator.extract(carrier, context=context.Context())
        token = context.attach(context.set_value(REQUEST_ID, request_id, parent))
        try:
            yield
        finally:
            context.detach(token)

    @contextmanager
    def request(self, job: Job) -> Iterator[None]:
        # The span is not made the current one: the pipeline's generator may be closed in another context.
        span = self._tracer.start_span(f"generate {job.model}", kind=SpanKind.SERVER)
        try:
            yield
        except Exception as error:
            span.set_status(Status(StatusCode.ERROR, type(error).__name__))
            raise
        finally:
            self._describe(span, job)
            self._stages(span, job)

    def close(self) -> None:
        self._provider.shutdown()

    def _describe(self, span: Span, job: Job) -> None:
        span.set_attributes(
            {
                "gen_ai.request.model": job.model,
                "gen_ai.usage.input_tokens": job.prompt_tokens,
                "gen_ai.usage.output_tokens": job.completion_tokens,
                "gen_ai.response.finish_reasons": job.finish_reasons,
                "loramux.experts": job.experts,
                "loramux.outcome": str(job.state),
            }
        )
        if request_id := context.get_value(REQUEST_ID):
            span.set_attribute(REQUEST_ID, str(request_id))

    def _stages(self, span: Span, job: Job) -> None:
        """The stages as spans with the job's own stamps; the request ends with the last of them."""
        parent = set_span_in_context(span)
        offset = time.time() - job.clock()
        at = {state: round((stamp + offset) * 1e9) for state, stamp in job.stamps.items()}
        for (state, start), (_, end) in pairwise(at.items()):
            stage = self._tracer.start_span(STAGES[state], context=parent, start_time=start)
            stage.end(end)
        span.end(at[job.state])
