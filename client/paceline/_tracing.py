"""The span of a call, in programs that use OpenTelemetry. The SDK needs nothing for that: others pay nothing for it.

Whatever fails in the tracing of the program costs a span, and never an answer.
"""

import logging
import sys
import time
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar
from uuid import uuid4

from paceline.errors import PacelineError
from paceline.types import Output
from paceline.v1 import inference_pb2 as pb

log = logging.getLogger("paceline")

P = ParamSpec("P")
T = TypeVar("T")


def _harmless(trace: Callable[P, T]) -> Callable[P, T | None]:
    """What it does, or None and a line of the log."""

    @wraps(trace)
    def guarded(*arguments: P.args, **named: P.kwargs) -> T | None:
        try:
            return trace(*arguments, **named)
        except Exception:
            log.warning("OpenTelemetry failed in this program; the call goes on, without its span", exc_info=True)
            return None

    return guarded


class CallSpan:
    """A CLIENT span from the call to the last chunk, to the error, or to the moment when nobody reads on.

    Names are those of OpenTelemetry's conventions for generative AI. The server's span is its child.
    """

    def __init__(self, method: str, target: str, request: pb.GenerateRequest | None = None) -> None:
        """Begin; `request` is None for a batch."""
        self._began_at = time.monotonic()
        self._first_at: float | None = None
        self._span: Any = None
        self._begin(method, target, request)
        self.metadata = (("traceparent", traceparent(self._span)),)

    @_harmless
    def _begin(self, method: str, target: str, request: pb.GenerateRequest | None) -> None:
        trace = _opentelemetry("get_tracer", "SpanKind", "Status", "StatusCode")
        if trace is None:
            return
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

    def note_chunk(self) -> None:
        """Something has come."""
        if self._first_at is None:
            self._first_at = time.monotonic()

    @_harmless
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
        self._note_error(error)
        self.end()

    @_harmless
    def _note_error(self, error: BaseException) -> None:
        span = self._span  # another thread may end it meanwhile
        status = error.code.name if isinstance(error, PacelineError) else ""
        if span is None or not isinstance(error, Exception) or status == "CANCELLED":
            return
        trace = sys.modules["opentelemetry.trace"]
        span.set_attribute("error.type", status or type(error).__qualname__)
        if status:
            span.set_attribute("rpc.response.status_code", status)
        span.set_status(trace.Status(trace.StatusCode.ERROR, str(error)))


def traceparent(span: Any = None) -> str:
    """The W3C trace context of `span`, or of the one that runs now.

    Where there is neither, it is a new trace whose flags leave it to the server whether to record.
    """
    return _recorded(span) or f"00-{uuid4().hex}-{uuid4().hex[:16]}-00"


@_harmless
def _recorded(span: Any) -> str:
    """The context of the program's own trace; "" where it has none."""
    trace = _opentelemetry("get_current_span")
    if trace is None:
        return ""
    context = (span or trace.get_current_span()).get_span_context()
    if not context.is_valid:
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def _opentelemetry(*needed: str) -> Any:
    """The API of OpenTelemetry where the program uses it; None also while another thread has imported half of it."""
    trace = sys.modules.get("opentelemetry.trace")
    return trace if all(hasattr(trace, name) for name in needed) else None


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
