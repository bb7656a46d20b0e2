"""A receiver of traces, made from OpenTelemetry's own contract: what Jaeger would get."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass
class Received:
    """A span, with what belongs to its process."""

    span: object  # opentelemetry.proto.trace.v1.Span
    service: str
    instance_id: str
    children: list[Received] = field(default_factory=list)

    @property
    def name(self):
        return self.span.name

    @property
    def attributes(self):
        return {one.key: value_of(one.value) for one in self.span.attributes}

    @property
    def events(self):
        return [event.name for event in self.span.events]

    @property
    def seconds(self):
        return (self.span.end_time_unix_nano - self.span.start_time_unix_nano) / 1e9

    def child(self, name):
        """The only child of that name."""
        (found,) = self.children_of(name)
        return found

    def children_of(self, name):
        return [child for child in self.children if child.name == name]


def value_of(value):
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [value_of(one) for one in value.array_value.values]
    return getattr(value, kind)


class OtlpReceiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Listens on a port of its own until it is closed; `fails` makes it refuse everything."""

    def __init__(self):
        self.spans = []
        self.fails = False
        self._lock = threading.Lock()
        self._server = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.endpoint = f"http://127.0.0.1:{port}"
        self._server.start()

    def Export(self, request, context):
        if self.fails:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not today")
        with self._lock:
            for resource_spans in request.resource_spans:
                resource = {one.key: value_of(one.value) for one in resource_spans.resource.attributes}
                for scope_spans in resource_spans.scope_spans:
                    self.spans += [
                        Received(span, resource["service.name"], resource["service.instance.id"])
                        for span in scope_spans.spans
                    ]
        return trace_service_pb2.ExportTraceServiceResponse()

    def close(self):
        self._server.stop(0)

    def roots(self):
        """Trees of everything that came; a span whose parent is unknown is a root."""
        by_id = {}
        for one in self.spans:
            one.children = []
            key = (one.span.trace_id, one.span.span_id)
            assert key not in by_id, f"two spans have the id of '{one.name}'"
            by_id[key] = one
        roots = []
        for one in self.spans:
            parent = by_id.get((one.span.trace_id, one.span.parent_span_id))
            (parent.children if parent else roots).append(one)
        for one in self.spans:
            one.children.sort(key=lambda child: child.span.start_time_unix_nano)
        return roots

    def requests(self):
        """The roots that are requests, by their ids."""
        return {
            root.attributes["gen_ai.response.id"]: root
            for root in self.roots()
            if "gen_ai.response.id" in root.attributes
        }
