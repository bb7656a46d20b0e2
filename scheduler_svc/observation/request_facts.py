"""What was asked for, under the names of spans' attributes."""

from __future__ import annotations

from scheduler_svc.answers import Answer

Facts = dict[str, str | int | float]


def facts_of_call(operation: str, method: str, model: str) -> Facts:
    """What is known of a request whatever becomes of it: which of `model` was asked, and by which call."""
    return {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "paceline",
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "rpc.system.name": "grpc",
        "rpc.method": f"paceline.v1.InferenceService/{method}",
    }


def facts_of(answer: Answer, model: str) -> Facts:
    """What a request asked of `model`."""
    request, terms, sampling = answer.request, answer.terms, answer.request.sampling
    facts = {
        **facts_of_call(terms.operation, terms.method, model),
        "gen_ai.request.max_tokens": request.max_output_count,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.seed": sampling.seed - 2**64 if sampling.seed >= 2**63 else sampling.seed,  # int64 there
    }
    if sampling.top_k:
        facts["gen_ai.request.top_k"] = sampling.top_k
    if len(answer.streams) > 1:
        facts["gen_ai.request.choice.count"] = len(answer.streams)
    if request.tenant:
        facts["paceline.tenant"] = request.tenant
    if request.priority:
        facts["paceline.priority"] = request.priority
    return facts


def content_of(answer: Answer) -> tuple[str, ...]:
    """The prompt as JSON messages, then the text of each choice: only where an operator has asked for it."""
    return (answer.terms.prompt_json, *(stream.text for stream in answer.streams))
