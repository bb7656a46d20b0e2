"""The span of a call, in programs that use OpenTelemetry. The SDK needs nothing for that: others pay nothing for it."""

import sys
import time
from typing import Any
from uuid import uuid4

from paceline.errors import PacelineError
from paceline.types import Output
from paceline.v1 import inference_pb2 as pb


class CallSpan:
    """A CLIENT span from the call to the last chunk, to the error, or to the moment when nobody reads on.

    Names are those of OpenTelemetry's conventions for generative AI. The server's span is its child.
    """

    def __init__(self, method: str, target: str, request: pb.GenerateRequest | None = None) -> None:
        """Begin; `request` is None for a batch."""
        self._began_at = time.monotonic()
        self._first_at: float | None = None
        self._span: Any = None
        trace = sys.modules.get("opentelemetry.trace")
        if trace is not None:
            operation = "chat" if request is not None and request.HasField("chat") else "text_completion"
            model = request.model if request is not None else ""
            self._span = trace.get_tracer("paceline").start_span(
                f"{operation} {model}".rstrip() if request is not None else "generate_batch",
                kind=trace.SpanKind.CLIENT,
                attributes={
                    "gen_ai.operation.name": operation,
                    "gen_ai.provider.name": "paceline",
                    "rpc.system.name": "grpc",
                    "rpc.method": f"paceline.v1.InferenceService/{method}",
                    **_address(target),
                    **(_asked(request) if request is not None else {}),
                },
            )
        self.metadata = (("traceparent", traceparent(self._span)),)

    def note_chunk(self) -> None:
        """Something has come."""
        if self._first_at is None:
            self._first_at = time.monotonic()

    def end(self, output: Output | None = None) -> None:
        """The call is over: with an answer, or because nobody reads on. What comes after the first end is nothing."""
        span, self._span = self._span, None
        if span is None:
            return
        if output is not None:
            span.set_attribute("gen_ai.response.finish_reasons", [choice.finish_reason for choice in output.choices])
            span.set_attribute("gen_ai.usage.input_tokens", output.usage.prompt_token_count)
            span.set_attribute("gen_ai.usage.output_tokens", output.usage.output_token_count)
            span.set_attribute("gen_ai.usage.cache_read.input_tokens", output.usage.cached_prompt_token_count)
        if self._first_at is not None:
            span.set_attribute("gen_ai.response.time_to_first_chunk", self._first_at - self._began_at)
        span.end()

    def fail(self, error: BaseException) -> None:
        """The call is over with an error: of the call, or of what the program does with its answers.

        That the reader leaves is none: it cancels, is cancelled, or the program is interrupted.
        """
        span = self._span  # another thread may end it meanwhile
        status = error.code.name if isinstance(error, PacelineError) else ""
        if span is not None and isinstance(error, Exception) and status != "CANCELLED":
            trace = sys.modules["opentelemetry.trace"]
            span.set_attribute("error.type", status or type(error).__qualname__)
            if status:
                span.set_attribute("rpc.response.status_code", status)
            span.set_status(trace.Status(trace.StatusCode.ERROR, str(error)))
        self.end()


def traceparent(span: Any = None) -> str:
    """The W3C trace context of `span`, or of the one that runs now.

    Where there is neither, it is a new trace whose flags leave it to the server whether to record.
    """
    trace = sys.modules.get("opentelemetry.trace")
    if trace is not None:
        context = (span or trace.get_current_span()).get_span_context()
        if context.is_valid:
            return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    return f"00-{uuid4().hex}-{uuid4().hex[:16]}-00"


def _asked(request: pb.GenerateRequest) -> dict[str, str | int | float]:
    """What was asked for, as far as the caller has said."""
    asked: dict[str, str | int | float] = {"paceline.request.id": request.request_id}
    if request.model:
        asked["gen_ai.request.model"] = request.model
    if request.choice_count > 1:
        asked["gen_ai.request.choice.count"] = request.choice_count
    if request.stopping.HasField("max_output_tokens"):
        asked["gen_ai.request.max_tokens"] = request.stopping.max_output_tokens
    for name in ("temperature", "top_p", "top_k"):
        if request.sampling.HasField(name):
            asked[f"gen_ai.request.{name}"] = getattr(request.sampling, name)
    return asked


def _address(target: str) -> dict[str, str | int]:
    host, _, port = target.rpartition(":")
    return {"server.address": host, "server.port": int(port)} if port.isdigit() else {"server.address": target}
