"""A lively scheduler to look at: an overview and a trace, as the scheduler would give them."""

import json
import math
import random

from google.protobuf.json_format import MessageToDict

from paceline.v1 import fleet_pb2 as fleet
from paceline.v1 import observation_pb2 as observation

QUEUE, PREFILL, DECODE, ENDED = (
    observation.REQUEST_STAGE_QUEUE,
    observation.REQUEST_STAGE_PREFILL,
    observation.REQUEST_STAGE_DECODE,
    observation.REQUEST_STAGE_ENDED,
)
FREE, CACHED, HELD = 0, 1, 2
_OUTCOMES = ["stop", "stop", "length", "stop", "cancelled", "stop", "deadline", "length", "error", "stop", "cut off"]


def sample_overview(at_unix_ms: int = 1_790_000_000_000, seed: int = 7) -> observation.GetOverviewResponse:
    """Three executors, one of them draining, under waves of load that an autoscaler follows."""
    chance = random.Random(seed)
    overview = observation.GetOverviewResponse(
        at_unix_ms=at_unix_ms,
        started_unix_ms=at_unix_ms - 7_530_000,
        release="0.2.0",
        durability=fleet.DURABILITY_ON,
        journal_bytes=18_734_080,
    )
    states = [fleet.EXECUTOR_STATE_READY, fleet.EXECUTOR_STATE_READY, fleet.EXECUTOR_STATE_DRAINING]
    overview.executors.extend(_executor(chance, number, state) for number, state in enumerate(states))
    overview.requests.extend(_requests(chance, at_unix_ms))
    overview.history.extend(_history(chance, at_unix_ms))
    _load(overview)
    overview.scaling.holder_id = "autoscaler-7f31c0de9a"
    overview.scaling.starting_executor_count = 1
    overview.scaling.decision.wanted_executor_count = 4
    overview.scaling.decision.reason = (
        "wants 4: the slowest 5 % wait 1.4 s for the first token, more than 1 s; 6 requests wait; up by at most 2"
    )
    overview.scaling.decision.changed_unix_ms = at_unix_ms - 22_000
    overview.scaling.decision.cost_per_hour = 9.42
    return overview


def as_json(overview: observation.GetOverviewResponse) -> bytes:
    """What `/api/overview` answers."""
    return json.dumps(MessageToDict(overview)).encode()


def _executor(chance: random.Random, number: int, state: fleet.ExecutorState) -> observation.ExecutorOverview:
    cells = []
    while len(cells) < 1024:
        kind = chance.choices([FREE, CACHED, HELD], [(2, 3, 6), (3, 2, 4), (6, 3, 1)][number])[0]
        cells += [kind] * chance.randint(4, 40)
    cells = cells[:1024]
    return observation.ExecutorOverview(
        executor=fleet.Executor(
            executor_id=f"executor-{number}",
            state=state,
            model=fleet.ExecutorModel(name="Llama-3.1-8B-Instruct", dtype="bfloat16", mode="packed"),
            capacity=fleet.ExecutorCapacity(block_count=4096, slot_count=256, step_token_count=2048),
            running_request_count=[6, 5, 3][number],
            free_block_count=4 * (cells.count(FREE) + cells.count(CACHED)),
            reusable_block_count=4 * cells.count(CACHED),
            step=48_211 + 97 * number,
            step_us=11_840 + 300 * number,
            known_token_count=9_100_000,
            reused_token_count=4_350_000 - 700_000 * number,
        ),
        block_cells=bytes(cells),
        blocks_per_cell=4,
        phases=observation.StepPhases(
            wait_us=610,
            idle_us=[5, 390, 12][number],
            prepare_us=420,
            forward_us=9_630,
            sample_us=1_010,
        ),
        steps_per_s=84.2 - number,
        tokens_per_s=[2480.5, 2210.0, 252.4][number],
        sent_bytes_per_s=61_400,
        received_bytes_per_s=38_900,
        empty_block_count=4 * cells.count(FREE),
        idle_share=[0.0004, 0.0312, 0.0011][number],
    )


def _requests(chance: random.Random, at_unix_ms: int) -> list[observation.RequestOverview]:
    """14 that run, the oldest first, 6 that wait, 26 that have ended, the latest first."""
    running = sorted((chance.uniform(900, 46_000) for _ in range(14)), reverse=True)
    waiting = sorted((chance.uniform(80, 1_900) for _ in range(6)), reverse=True)
    requests = []
    for age in running:
        requests.append(_request(chance, at_unix_ms, age, ended_before=0.0))
    for age in waiting:
        request = _request(chance, at_unix_ms, age, ended_before=0.0)
        del request.phases[:]
        request.phases.add(stage=QUEUE, begin_ms=0, end_ms=age)
        request.stage, request.first_token_ms, request.output_token_count, request.reused_token_count = QUEUE, 0, 0, 0
        requests.append(request)
    for number in range(26):
        ended_before = 500 + 1_900.0 * number
        request = _request(chance, at_unix_ms, ended_before + chance.uniform(1_500, 14_000), ended_before)
        request.outcome = _OUTCOMES[number % len(_OUTCOMES)]
        if request.outcome == "error":
            request.error = "its executor was lost twice while it computed this request"
        requests.append(request)
    return requests


def _request(chance: random.Random, at_unix_ms: int, age_ms: float, ended_before: float) -> observation.RequestOverview:
    end = age_ms - ended_before
    queue, prefill = min(chance.uniform(1, 700), 0.2 * end), min(chance.uniform(60, 1_300), 0.4 * end)
    prompt = chance.choice([48, 312, 1_024, 2_210, 5_870])
    executor_id = f"executor-{chance.choice([0, 0, 1, 1, 2])}"
    request = observation.RequestOverview(
        request_id=f"{chance.getrandbits(128):032x}",
        trace_id=f"{chance.getrandbits(128):032x}",
        is_traced=chance.random() < 0.1,
        stage=ENDED if ended_before else DECODE,
        tenant=chance.choice(["search", "support-bot", "batch", ""]),
        choice_count=1,
        prompt_token_count=prompt,
        reused_token_count=prompt // 2 // 16 * 16 if prompt > 300 else 0,
        output_token_count=int((end - queue - prefill) / 26) + 1,
        max_output_token_count=chance.choice([2_048, 4_096]),
        received_unix_ms=int(at_unix_ms - age_ms),
        accepted_unix_ms=int(at_unix_ms - age_ms),
        first_token_ms=queue + prefill,
        total_ms=end if ended_before else 0,
    )
    ends = [(QUEUE, queue), (PREFILL, queue + prefill)]
    if end > 9_000 and chance.random() < 0.4:  # it gave its blocks to others, and came back
        request.recomputation_count = 1
        ends += [(DECODE, 0.5 * end), (QUEUE, 0.5 * end + 900), (PREFILL, 0.5 * end + 1_300)]
    begin = 0.0
    for stage, until in [*ends, (DECODE, end)]:
        where = "" if stage == QUEUE else executor_id
        request.phases.add(stage=stage, begin_ms=begin, end_ms=until, executor_id=where)
        begin = until
    return request


def _history(chance: random.Random, at_unix_ms: int) -> list[observation.FleetSample]:
    samples = []
    ready, wanted = 1, 1
    for number in range(300):
        wave = 10 + 9 * math.sin(number / 34) + 5 * math.sin(number / 9) + chance.uniform(-1, 1)
        running = max(0, round(min(wave, 9 * ready)))
        waiting = max(0, round(wave - 9 * ready))
        wanted = max(1, min(4, math.ceil(wave / 7))) if number % 12 == 0 else wanted
        ready += (wanted > ready) - (wanted < ready) if number % 9 == 0 else 0
        median = 140 + 60 * waiting + chance.uniform(0, 30)
        slowest = 2.4 * median + 80
        if number >= 292:  # what the rest of the overview shows
            ready, wanted, running, waiting, median, slowest = 2, 4, 14, max(0, number - 293), 412, 1_390
        samples.append(
            observation.FleetSample(
                at_unix_ms=at_unix_ms - 2_000 * (299 - number),
                ready_executor_count=ready,
                running_request_count=running,
                waiting_request_count=waiting,
                tokens_per_s=running * chance.uniform(36, 41),
                held_share=running / 40,
                wanted_executor_count=wanted,
                first_token_p50_ms=median,
                first_token_p95_ms=slowest,
            )
        )
    return samples


def _load(overview: observation.GetOverviewResponse) -> None:
    blocks = sum(it.executor.capacity.block_count for it in overview.executors)
    free = sum(it.executor.free_block_count for it in overview.executors)
    waiting = [request for request in overview.requests if request.stage == QUEUE]
    load = overview.load
    load.model, load.epoch = "Llama-3.1-8B-Instruct", 3
    load.running_request_count, load.waiting_request_count = 14, len(waiting)
    load.oldest_waiting_ms = max(overview.at_unix_ms - request.received_unix_ms for request in waiting)
    load.running_token_count, load.backlog_token_count, load.backlog_ms = 48_930, 11_200, 2_300
    load.block_count, load.held_block_count = blocks, blocks - free
    load.generated_token_count, load.refused_request_count = 3_811_402, 17
    load.first_token.p50_us, load.first_token.p95_us = 412_000, 1_390_000
    for it in overview.executors:
        load.executors.add(executor_id=it.executor.executor_id, state=it.executor.state)


def sample_trace(request: observation.RequestOverview) -> bytes:
    """What `/api/trace/<id>` answers: OTLP/JSON with the spans of the request, its phases and some steps."""
    begin = request.received_unix_ms * 1_000_000
    end_ms = request.phases[-1].end_ms
    names = {QUEUE: "queue", PREFILL: "prefill", DECODE: "decode"}
    root = _span(
        "generate", 1, "", begin, 0, end_ms, {"paceline.request_id": request.request_id, "paceline.choices": 1}
    )
    root["events"] = [{"timeUnixNano": str(begin + int(request.first_token_ms * 1e6)), "name": "first token"}]
    root["attributes"].append({"key": "paceline.account", "value": _value(sample_account(request))})
    if request.recomputation_count:
        where = next(phase.executor_id for phase in request.phases if phase.executor_id)
        about = {"paceline.executor.id": where}
        at = str(begin + int(request.phases[2].end_ms * 1e6))
        root["events"].append({"timeUnixNano": at, "name": "executor lost", "attributes": _attributes(about)})
    if request.outcome == "error":
        root["status"] = {"code": 2, "message": request.error}
    scheduler, executor = [root], []
    for number, phase in enumerate(request.phases, 2):
        about = {"paceline.executor.id": phase.executor_id, "paceline.blocks": ["3", "9"]} if phase.executor_id else {}
        scheduler.append(_span(names[phase.stage], number, root["spanId"], begin, phase.begin_ms, phase.end_ms, about))
        if phase.stage != QUEUE:
            length = (phase.end_ms - phase.begin_ms) / 5
            for step in range(5):
                first = phase.begin_ms + step * length
                about = {"paceline.step": 48_211 + step, "paceline.tokens": 512, "paceline.forward_ms": 9.63}
                parent = scheduler[-1]["spanId"]
                executor.append(_span("step", 100 * number + step, parent, begin, first, first + 0.8 * length, about))
    services = [("paceline-scheduler", scheduler), ("paceline-executor", executor)]
    return json.dumps({"resourceSpans": [_resource(name, spans) for name, spans in services]}).encode()


def sample_account(request: observation.RequestOverview) -> list[str]:
    """The sentences that come with its trace."""
    return [
        f"ended with {request.outcome or 'nothing yet'}",
        "queue 210 ms (4 %) for the step's tokens; decode 4.80 s (90 %)",
    ]


def _resource(service: str, spans: list[dict]) -> dict:
    return {
        "resource": {"attributes": _attributes({"service.name": service, "service.instance.id": f"{service}-0"})},
        "scopeSpans": [{"spans": spans}],
    }


def _span(name: str, number: int, parent: str, begin: int, first_ms: float, last_ms: float, about: dict) -> dict:
    return {
        "traceId": "5b8efff798038103d269b633813fc60c",
        "spanId": f"{number:016x}",
        "parentSpanId": parent,
        "name": name,
        "kind": 1,
        "startTimeUnixNano": str(begin + int(first_ms * 1e6)),
        "endTimeUnixNano": str(begin + int(last_ms * 1e6)),
        "attributes": _attributes(about),
    }


def _attributes(about: dict) -> list[dict]:
    return [{"key": key, "value": _value(value)} for key, value in about.items()]


def _value(value: str | int | float | list[str]) -> dict:
    match value:
        case list():
            return {"arrayValue": {"values": [_value(part) for part in value]}}
        case int():
            return {"intValue": str(value)}
        case float():
            return {"doubleValue": value}
    return {"stringValue": value}
