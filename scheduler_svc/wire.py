"""Plans to bytes, results from bytes: the core's values on the step stream."""

from array import array
from collections.abc import Iterable

import numpy as np

from paceline.internal.v1 import executor_pb2 as pb
from scheduler_svc.core.plan import NewRequest, Plan, ProtocolError, Result
from scheduler_svc.core.request import TraceContext


def encode_plan(plan: Plan) -> pb.Plan:
    """Put a plan into its message; nothing is written for a request that goes on decoding."""
    message = pb.Plan(step=plan.step, sampling_row_count=len(plan.rows))
    if plan.dropped_slots:
        message.dropped_slots = _uint16(plan.dropped_slots)
    if plan.copies:
        message.copies = _uint32(block for pair in plan.copies for block in pair)
    if plan.adopted:
        message.adopting_slots = _uint16(slot for slot, _ in plan.adopted)
        message.adopted_token_counts = _uint32(count for _, count in plan.adopted)
    if len(plan.skipped_slots):
        message.skipped_slots = plan.skipped_slots.astype("<u2").tobytes()
    if plan.paused_slots:
        message.paused_slots = _uint16(plan.paused_slots)
    if plan.appended:
        message.appended_slots = _uint16(slot for slot, _, _ in plan.appended)
        message.appended_block_ids = _uint32(block for _, _, block in plan.appended)
        if any(group for _, group, _ in plan.appended):
            message.appended_groups = bytes(group for _, group, _ in plan.appended)
    if plan.chunks:
        message.chunk_slots = _uint16(chunk.slot for chunk in plan.chunks)
        message.chunk_token_counts = _uint32(chunk.count for chunk in plan.chunks)
    if plan.new_requests:
        message.new_requests.extend(_encode_new_request(request) for request in plan.new_requests)
    return message


def decode_result(message: pb.StepResult) -> Result:
    """Read a result out of its message. Raises `ProtocolError` when it is none."""
    if len(message.token_ids) % 4:
        raise ProtocolError(f"result of step {message.step} has {len(message.token_ids)} bytes of token ids")
    errors = {error.slot: error.message for error in message.errors} if message.errors else {}
    timings = message.timings
    seconds = (timings.prepare_us + timings.forward_us + timings.sample_us) / 1e6
    return Result(message.step, np.frombuffer(message.token_ids, dtype="<i4").tolist(), errors, seconds)


def encode_trace(trace: TraceContext | None) -> pb.TraceContext | None:
    """Put a trace context into its message."""
    if trace is None:
        return None
    return pb.TraceContext(trace_id=trace.trace_id, span_id=trace.span_id, flags=trace.flags)


def _encode_new_request(request: NewRequest) -> pb.NewRequest:
    sampling = request.sampling
    return pb.NewRequest(
        slot=request.slot,
        request_id=request.request_id,
        attempt=request.attempt,
        token_ids=_uint32(request.token_ids),
        output_count=request.output_count,
        computed_count=request.computed_count,
        block_tables=[_uint32(table) for table in request.block_tables],
        choice=request.choice,
        sampling=pb.Sampling(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=sampling.seed,
        ),
        stop_token_ids=_uint32(sorted(request.stop_token_ids)),
        max_output_count=request.max_output_count,
        trace=encode_trace(request.trace),
    )


def _uint16(values: Iterable[int]) -> bytes:
    return np.fromiter(values, dtype="<u2").tobytes()


def _uint32(values: Iterable[int]) -> bytes:
    return (
        np.array(values, dtype="<u4").tobytes() if isinstance(values, array) else np.fromiter(values, "<u4").tobytes()
    )
