"""The trace context that travels with a request (https://www.w3.org/TR/trace-context/)."""

import re

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


def parse_traceparent(header: str) -> tuple[bytes, bytes, int] | None:
    """Read (trace id of 16 bytes, span id of 8 bytes, flags) from a `traceparent`; None when it is not a valid one."""
    match = _TRACEPARENT.fullmatch(header)
    if match is None or header.startswith("ff"):
        return None
    trace_id, span_id = bytes.fromhex(match[1]), bytes.fromhex(match[2])
    return (trace_id, span_id, int(match[3], 16)) if any(trace_id) and any(span_id) else None
