"""Plans to bytes, results from bytes: the core's values on the step stream."""

from array import array
from collections.abc import Callable, Iterable

import numpy as np

from common.token_hashes import hash_tokens
from paceline.internal.v1 import executor_pb2 as pb
from scheduler_svc.core.plan import HeldAttempt, HeldState, Inventory, NewRequest, Plan, ProtocolError, Result
from scheduler_svc.core.request import Request, TraceContext
from scheduler_svc.observation.step_meter import Phases


def encode_plan(plan: Plan, acknowledged_step: int = 0) -> pb.Plan:
    """Put a plan into its message; nothing is written for a request that goes on decoding.

    `acknowledged_step` is told with it, unless it is 0.
    """
    message = pb.Plan(
        step=plan.step,
        sampling_row_count=len(plan.rows),
        acknowledged_step=acknowledged_step,
        announces=plan.announces,
    )
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
    out_of_memory = frozenset(error.slot for error in message.errors if error.out_of_memory) if errors else frozenset()
    token_ids = np.frombuffer(message.token_ids, dtype="<i4").tolist()
    return Result(message.step, token_ids, errors, seconds, out_of_memory)


def decode_phases(timings: pb.Timings) -> Phases:
    """Where the time of a step went, in seconds."""
    return Phases(
        idle=timings.idle_us / 1e6,
        wait=timings.queued_us / 1e6,
        prepare=timings.prepare_us / 1e6,
        forward=timings.forward_us / 1e6,
        sample=timings.sample_us / 1e6,
    )


def decode_inventory(message: pb.Attached, find: Callable[[str, int], Request | None]) -> Inventory:
    """Read what an executor still has; `find` knows the requests that have not ended, by id and choice.

    What it has of a request counts only if it has computed the very tokens that are known here, or more of them. Raises
    `ProtocolError` when a field cannot be read.
    """
    return Inventory(message.last_step, tuple(_decode_held(held, find) for held in message.held))


_HELD_STATES = {
    pb.HELD_STATE_CATCHING_UP: HeldState.CATCHING_UP,
    pb.HELD_STATE_DECODING: HeldState.DECODING,
}


def _decode_held(message: pb.HeldAttempt, find: Callable[[str, int], Request | None]) -> HeldAttempt:
    fields = (message.output_ids, *message.block_tables)
    if any(len(data) % 4 for data in fields):
        raise ProtocolError(f"the inventory of request '{message.request_id}' has a field that is cut off")
    request = find(message.request_id, message.choice)
    if request is not None and not _has_the_same_tokens(request, message):
        request = None
    return HeldAttempt(
        request=request,
        slot=message.slot if message.HasField("slot") else None,
        attempt=message.attempt,
        output_ids=array("I", message.output_ids),
        computed_count=message.computed_count,
        state=_HELD_STATES.get(message.state, HeldState.HALTED),
        block_tables=tuple(tuple(np.frombuffer(table, dtype="<u4").tolist()) for table in message.block_tables),
        error="" if message.out_of_memory else message.error,  # it may run elsewhere
    )


def _has_the_same_tokens(request: Request, message: pb.HeldAttempt) -> bool:
    """Whether the executor's tokens are the request's, perhaps with some more generated at the end."""
    if request.key != message.key:
        return False  # a request with the same id, before this one
    known = request.output_ids.tobytes()
    prompt = request.token_ids[: request.prompt_count].tobytes()
    return message.output_ids.startswith(known) and message.tokens_hash == hash_tokens(prompt, message.output_ids)


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
        key=request.key,
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
