"""A request's life as OpenTelemetry spans; the packages are optional."""

import asyncio
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import openai
import pytest

from loramux.server import traces as traces_module
from loramux.server.engine.protocol import EngineError
from loramux.server.errors import StartError
from loramux.server.traces import make_traces
from tests.http.serving import TOKENIZER, Served, serving
from tests.kit import ScriptedEngine, saying

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
STAGES = ["route", "blend", "lease", "queue", "prefill", "decode"]


@pytest.fixture
def memory() -> Any:
    """An exporter that keeps what it gets."""
    pytest.importorskip("opentelemetry.sdk", reason="loramux[otel] is not installed")
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    return InMemorySpanExporter()


@contextmanager
def traced(tmp_path: Path, memory: Any, **options: Any) -> Iterator[Served]:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    from loramux.server.otel import OtelTraces

    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    with serving(tmp_path, traces=OtelTraces(provider), **options) as served:
        yield served


def spans(memory: Any) -> tuple[Any, list[Any]]:
    """The request's span and its stages, in the order of their beginnings."""
    finished = memory.get_finished_spans()
    (request,) = [span for span in finished if span.name.startswith("generate ")]
    stages = [span for span in finished if span is not request]
    assert {span.parent.span_id for span in stages} == {request.context.span_id}
    assert {span.context.trace_id for span in finished} == {request.context.trace_id}
    return request, stages


@pytest.mark.parametrize("stream", [False, True])
def test_one_span_for_each_stage_without_gaps(tmp_path: Path, memory: Any, stream: bool) -> None:
    with traced(tmp_path, memory) as served:
        answer = served.chat("math", stream=stream, extra_headers={"x-request-id": "mine"})
        if stream:
            list(answer)
        job_seconds = served.metric("loramux_request_duration_seconds_sum")
        decode_seconds = served.metric("loramux_decode_seconds_sum")
    request, stages = spans(memory)
    assert [span.name for span in stages] == STAGES
    assert all(before.end_time == after.start_time for before, after in pairwise(stages))
    assert stages[-1].end_time == request.end_time
    # They are the job's own stamps, to the resolution of a float of today.
    assert (stages[-1].end_time - stages[0].start_time) / 1e9 == pytest.approx(job_seconds, abs=1e-6)
    assert (stages[-1].end_time - stages[-1].start_time) / 1e9 == pytest.approx(decode_seconds, abs=1e-6)
    assert request.parent is None
    assert request.attributes["gen_ai.request.model"] == "auto"
    assert request.attributes["gen_ai.usage.output_tokens"] == 13
    assert request.attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert request.attributes["loramux.experts"] == ("math",)
    assert request.attributes["loramux.outcome"] == "finished"
    assert request.attributes["loramux.request_id"] == "mine"
    assert not any("math" in str(value) for span in stages for value in span.attributes.values())


def test_the_trace_that_the_client_names_goes_on(tmp_path: Path, memory: Any) -> None:
    with traced(tmp_path, memory) as served:
        served.chat("math", extra_headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    request, _ = spans(memory)
    assert f"{request.context.trace_id:032x}" == TRACE
    assert f"{request.parent.span_id:016x}" == PARENT


@pytest.mark.parametrize("header", ["nonsense", f"00-{TRACE}-{PARENT}", f"00-{'0' * 32}-{PARENT}-01"])
def test_a_malformed_traceparent_begins_a_trace(tmp_path: Path, memory: Any, header: str) -> None:
    with traced(tmp_path, memory) as served:
        served.chat("math", extra_headers={"traceparent": header})
    request, _ = spans(memory)
    assert request.parent is None


def test_a_trace_that_is_not_sampled_leaves_nothing(tmp_path: Path, memory: Any) -> None:
    with traced(tmp_path, memory) as served:
        served.chat("math", extra_headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert memory.get_finished_spans() == ()


def test_requests_at_the_same_time_do_not_mix(tmp_path: Path, memory: Any) -> None:
    traces = [f"{number:032x}" for number in range(1, 9)]
    with traced(tmp_path, memory) as served:

        async def ask_all() -> None:
            async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
                await asyncio.gather(*(ask(client, trace) for trace in traces))

        async def ask(client: openai.AsyncOpenAI, trace: str) -> None:
            stream = await client.chat.completions.create(
                model="auto",
                messages=[{"role": "user", "content": "math"}],
                stream=True,
                extra_headers={"traceparent": f"00-{trace}-{PARENT}-01"},
            )
            async for _ in stream:
                pass

        asyncio.run(ask_all())
    found: dict[str, list[str]] = {}
    for span in memory.get_finished_spans():
        found.setdefault(f"{span.context.trace_id:032x}", []).append(span.name)
    assert found == {trace: [*STAGES, "generate auto"] for trace in traces}


def test_a_failure_ends_the_trace_where_it_happened(tmp_path: Path, memory: Any) -> None:
    engine = ScriptedEngine(saying(TOKENIZER, "Hello"), fail_after=0, failure=EngineError("a secret prompt"))
    with traced(tmp_path, memory, engine=engine) as served, pytest.raises(openai.InternalServerError):
        served.chat("math")
    request, stages = spans(memory)
    assert [span.name for span in stages] == STAGES[:5]
    assert request.attributes["loramux.outcome"] == "failed"
    assert (request.status.is_ok, request.status.description) == (False, "EngineError")
    assert not request.events


def test_a_client_that_leaves_ends_the_trace_as_aborted(tmp_path: Path, memory: Any) -> None:
    with traced(tmp_path, memory, engine=ScriptedEngine(saying(TOKENIZER, "x" * 200))) as served:
        served.hold()
        body = {"model": "math", "prompt": "a", "stream": True}
        with served.http.stream("POST", "/v1/completions", json=body):
            served.wait_for(lambda: served.engine.running == 1)
        served.wait_for(lambda: bool(memory.get_finished_spans()))
        served.wait_for(lambda: any(s.name == "generate math" for s in memory.get_finished_spans()))
    request, _ = spans(memory)
    assert request.attributes["loramux.outcome"] == "aborted"
    assert request.status.is_unset


class Collector(BaseHTTPRequestHandler):
    """Takes what an OTLP exporter sends."""

    got: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        self.got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_spans_are_sent_where_the_variables_say(
    tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    collector = type("Here", (Collector,), {"got": []})
    with HTTPServer(("127.0.0.1", 0), collector) as receiver:
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{receiver.server_port}")
        with serving(tmp_path, traces=make_traces(True)) as served:
            served.chat("math")
        receiver.shutdown()
    ((path, body),) = collector.got
    assert path == "/v1/traces"
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    assert {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"] == "loramux"
    names = [span.name for scope in resource.scope_spans for span in scope.spans]
    assert names == [*STAGES, "generate auto"]


def test_without_the_packages_the_start_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    monkeypatch.delitem(sys.modules, "loramux.server.otel", raising=False)
    with pytest.raises(
        StartError, match=r"traces: opentelemetry is not installed; pip install 'loramux\[otel\]'"
    ):
        make_traces(True)


def test_one_file_imports_it_and_that_is_imported_only_when_asked_for() -> None:
    server = Path(traces_module.__file__).parent
    imports = re.compile(r"^( *)(?:from|import) (opentelemetry|loramux\.server\.otel)\b", re.MULTILINE)
    found = {
        (file.relative_to(server).as_posix(), name, bool(indent))
        for file in server.rglob("*.py")
        for indent, name in imports.findall(file.read_text())
    }
    assert found == {("otel.py", "opentelemetry", False), ("traces.py", "loramux.server.otel", True)}
