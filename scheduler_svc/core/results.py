"""What a result says about the plan that it answers."""

from scheduler_svc.core.executor import Executor
from scheduler_svc.core.plan import Plan, ProtocolError, Result
from scheduler_svc.core.request import Request, RequestState


def settle_blocks(executor: Executor, plan: Plan, result: Result) -> None:
    """Offer what the step has filled, before its requests may end; what a failing row has written is never offered."""
    for chunk in plan.chunks:
        request = chunk.request
        if request.executor is executor and not chunk.samples and chunk.slot not in result.errors:
            request.computed_count = chunk.start + chunk.count
            executor.settle(request)
    for row in plan.settling:
        request = plan.rows[row]
        if request.executor is executor and result.token_ids[row] >= 0:
            request.computed_count = len(request.token_ids)
            executor.settle(request)


def answered_plan(executor: Executor, result: Result) -> Plan:
    """The plan that the result answers."""
    if not executor.in_flight:
        raise ProtocolError(f"result of step {result.step}, but no plan is in flight")
    plan = executor.in_flight[0]
    if plan.step != result.step:
        raise ProtocolError(f"result of step {result.step}, but step {plan.step} is next")
    if len(plan.rows) != len(result.token_ids):
        raise ProtocolError(f"step {plan.step} samples {len(plan.rows)} rows, its result has {len(result.token_ids)}")
    if result.errors or min(result.token_ids, default=0) < 0:
        _check_missing_tokens(plan, result)
    return plan


def _check_missing_tokens(plan: Plan, result: Result) -> None:
    owners = owners_of(plan)
    for slot in result.errors:
        if slot not in owners:
            raise ProtocolError(f"step {plan.step} does not compute slot {slot}, but its result reports an error there")
    for slot, request, token in zip(plan.row_slots.tolist(), plan.rows, result.token_ids, strict=True):
        if token < 0 and request.state is RequestState.RUNNING and slot not in result.errors:
            raise ProtocolError(f"step {plan.step} has no token for slot {slot}, whose request has not ended")


def owners_of(plan: Plan) -> dict[int, Request]:
    """Who is in each slot that the plan computes."""
    chunked = {chunk.slot: chunk.request for chunk in plan.chunks}
    return chunked | dict(zip(plan.row_slots.tolist(), plan.rows, strict=True))
