"""The load as a message."""

from __future__ import annotations

import time

from paceline.v1 import fleet_pb2
from scheduler_svc.arrivals import Hold
from scheduler_svc.core import load
from scheduler_svc.core.executor import Executor
from scheduler_svc.engine import Engine
from scheduler_svc.fleet import Fleet, Member, state_of
from scheduler_svc.load_meter import LatencyMeter, LoadWatcher


def load_of(model: str, fleet: Fleet, engine: Engine, watcher: LoadWatcher) -> fleet_pb2.WatchLoadResponse:
    """What there is to do now for the executors of `fleet`, and what was since the beginning."""
    now, scheduler, meter = time.monotonic(), engine.scheduler, engine.meter
    executors = list(scheduler.executors.values())
    taking = [executor for executor in executors if not executor.draining]
    backlog = load.backlog(scheduler)
    waits = (engine.arrivals.held_since(Hold.EXECUTOR), engine.oldest_waiting_at())
    prompt_count, output_count = meter.mean_lengths
    members = sorted(fleet.members.values(), key=lambda member: member.joined.executor_id)
    return fleet_pb2.WatchLoadResponse(
        model=model,
        epoch=fleet.epoch,
        waiting_request_count=engine.waiting_count,
        waiting_token_count=scheduler.waiting_token_count,
        oldest_waiting_ms=max((round(1000 * (now - since)) for since in waits if since is not None), default=0),
        running_request_count=sum(len(executor.running) for executor in executors),
        running_token_count=sum(load.running_token_count(executor) for executor in executors),
        backlog_token_count=backlog.token_count,
        backlog_ms=min(2**32 - 1, round(1000 * backlog.seconds)),
        block_count=sum(executor.capacity.block_count for executor in taking),
        held_block_count=sum(load.held_block_count(executor) for executor in taking),
        arrived_request_count=meter.arrived_request_count,
        arrived_prompt_token_count=meter.arrived_prompt_token_count,
        refused_request_count=meter.refused_request_count,
        ended_request_count=meter.ended_request_count,
        generated_token_count=meter.generated_token_count,
        computed_token_count=meter.computed_token_count,
        reused_token_count=meter.reused_token_count,
        first_token=_latency(meter.first_token, watcher.first_token_within_count, now),
        per_token=_latency(meter.per_token, watcher.per_token_within_count, now),
        mean_prompt_token_count=prompt_count,
        mean_output_token_count=output_count,
        executors=[_executor(member, engine) for member in members],
    )


def _latency(meter: LatencyMeter, within_target_count: int, now: float) -> fleet_pb2.Latency:
    p50, p95, p99 = (round(1e6 * seconds) for seconds in meter.quantiles(now, 0.5, 0.95, 0.99))
    return fleet_pb2.Latency(
        count=meter.count,
        sum_us=round(1e6 * meter.sum_s),
        within_target_count=within_target_count,
        p50_us=p50,
        p95_us=p95,
        p99_us=p99,
    )


def _executor(member: Member, engine: Engine) -> fleet_pb2.ExecutorLoad:
    joined = member.joined
    message = fleet_pb2.ExecutorLoad(
        executor_id=joined.executor_id,
        state=state_of(member, engine),
        block_count=joined.capacity.block_count,
        slot_count=joined.capacity.slot_count,
        step_token_count=joined.capacity.step_token_count,
        startup_ms=joined.startup_ms,
    )
    executor = engine.scheduler.executors.get(joined.executor_id) if member.link.is_attached else None
    if executor is not None:
        _measure(message, executor)
    return message


def _measure(message: fleet_pb2.ExecutorLoad, executor: Executor) -> None:
    per_token, per_step = executor.step_times.line()
    message.running_request_count = len(executor.running)
    message.running_token_count = load.running_token_count(executor)
    message.useful_token_count = load.useful_token_count(executor)
    message.held_block_count = load.held_block_count(executor)
    message.cache_token_count = load.cache_token_count(executor)
    message.step_us = 1e6 * per_step
    message.token_us = 1e6 * per_token
