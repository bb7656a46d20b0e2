"""Tables of ticks: what was seen at each moment, and what a policy is to want then.

One line per tick, `name value` pairs before the arrow, the wanted number behind it, `-` for no opinion:

    t 0   ready 2  requests 20  -> 2

`ready` and `starting` count executors; `requests` wait as far as they do not run; everything else names a field of
`PoolLoad`, of `Observation`, or of every executor (`step_us`, `slots` …). What a line does not name stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

from autoscaler_svc.load import ExecutorLoad, PoolLoad
from autoscaler_svc.observations import Arrivals, Observation, Observations

_SHORT = {
    "slots": "slot_count",
    "blocks": "block_count",
    "held": "held_block_count",
    "waiting": "waiting_request_count",
}
_EXECUTOR = {field.name for field in fields(ExecutorLoad)} - {"running_request_count", "running_token_count"}
_LOAD = {field.name for field in fields(PoolLoad)} - _EXECUTOR

EXECUTOR = ExecutorLoad(
    "e", slot_count=10, block_count=100, cache_token_count=1600, step_token_count=512, step_us=10_000, token_us=100
)


def observe(values: dict[str, float]) -> Observation:
    """The observation that a line says."""
    executor, load = EXECUTOR, PoolLoad(model="m", epoch=1)
    observation = Observation(at=values["t"], load=load)
    count, requests = int(values.get("ready", 0)), values.get("requests")
    for name, value in values.items():
        name = _SHORT.get(name, name)
        if name in _LOAD:
            load = replace(load, **{name: value})
        elif name in _EXECUTOR:
            executor = replace(executor, **{name: value})
    if requests is not None:
        running = min(requests, values.get("running", requests), count * executor.slot_count)
        load = replace(load, waiting_request_count=requests - running, running_request_count=running)
    executors = tuple(replace(executor, executor_id=f"e{number}") for number in range(count))
    load = replace(load, executors=executors, held_block_count=executor.held_block_count * count)
    rate = values.get("rate", 0.0)
    return replace(
        observation,
        load=load,
        starting_count=int(values.get("starting", 0)),
        startup_s=values.get("startup_s", 0.0),
        arrivals=Arrivals(rate, rate, "level"),
    )


def check(table: str, wanted: Callable[[float, Observations], object]) -> None:
    """Go through a table and hold every line's number against what `wanted` says."""
    seen, values, lines = Observations(), dict[str, float](), 0
    for line in (line.split("#")[0].strip() for line in table.splitlines()):
        if not line:
            continue
        before, arrow, expected = line.partition("->")
        assert arrow, f"no arrow in {line!r}"
        words = before.split()
        values |= {name: float(value) for name, value in zip(words[::2], words[1::2], strict=True)}
        seen.add(observe(values))
        said = wanted(values["t"], seen)
        assert str("-" if said is None else said) == expected.strip(), f"{line!r}: {said}"
        lines += 1
    assert lines
