"""Scenarios as text: each file in `scenarios/` shows commands and exactly what the scheduler decided.

A file's name is its claim. After a change that is meant, rewrite them with `UPDATE_SCENARIOS=1` and review the
difference like code.

    executor e blocks=4 block=4 slots=4 tokens=16    an executor joins
    add a prompt=7 output=4 stop=9 deadline=5        a request arrives (stop: a stop token; both may be left out)
    plan e                                           what the next step computes
    result e 1 2 fail=0:why                          its tokens, one for each row; -1 for none; failed slots
    cancel a | finish a 2 | expire 5 | drain e | lose e | show
"""

import os
from array import array
from pathlib import Path

import pytest

from scheduler_svc.core.plan import Capacity, NeverFitsError, Plan, Result
from scheduler_svc.core.request import FinishReason, Request
from scheduler_svc.core.scheduler import Scheduler

FILES = sorted((Path(__file__).parent / "scenarios").glob("*.txt"))


class Stage:
    """Plays one scenario."""

    def __init__(self) -> None:
        self.scheduler = Scheduler()
        self.requests: dict[str, Request] = {}

    def play(self, line: str) -> list[str]:
        command, *words = line.split()
        named = dict(word.split("=", 1) for word in words if "=" in word)
        plain = [word for word in words if "=" not in word]
        lines = getattr(self, f"_{command}")(*plain, **named)
        self.scheduler.check_invariants()
        return lines

    def _executor(self, name: str, blocks: str, block: str = "4", slots: str = "4", tokens: str = "16") -> list[str]:
        self.scheduler.join(name, Capacity(int(block), int(blocks), int(slots), int(tokens)))
        return []

    def _add(self, name: str, prompt: str, output: str, stop: str = "", deadline: str = "inf") -> list[str]:
        stops = frozenset({int(stop)}) if stop else frozenset()
        request = Request(
            name,
            array("I", range(int(prompt))),
            int(prompt),
            int(output),
            stop_token_ids=stops,
            deadline=float(deadline),
        )
        try:
            self.scheduler.add(request)
        except NeverFitsError as error:
            return [f"refused: {error}"]
        self.requests[name] = request
        return []

    def _plan(self, name: str) -> list[str]:
        before = {request: request.placement_count for request in self.requests.values() if request.executor}
        plan = self.scheduler.plan(name, now=0.0)
        gone = [request for request in before if request.executor is None]
        preempted = [f"preempt {request.request_id}" for request in gone]
        return preempted + (describe(plan) if plan else ["nothing"])

    def _result(self, name: str, *tokens: str, fail: str = "") -> list[str]:
        errors = {int(fail.split(":")[0]): fail.split(":")[1]} if fail else {}
        step = self.scheduler.executors[name].in_flight[0].step
        outputs = self.scheduler.apply(name, Result(step, [int(token) for token in tokens], errors))
        ended = [f"{request.request_id} finished {request.finish_reason.value}" for request in outputs.finished]
        return [f"{request.request_id} {token}" for request, token in outputs.tokens] + ended

    def _cancel(self, name: str) -> list[str]:
        self.scheduler.cancel(self.requests[name])
        return self._show()

    def _finish(self, name: str, output_count: str) -> list[str]:
        self.scheduler.finish(self.requests[name], int(output_count), FinishReason.STOP)
        return self._show()

    def _expire(self, now: str) -> list[str]:
        return [f"{request.request_id} expired" for request in self.scheduler.expire(float(now))]

    def _drain(self, name: str) -> list[str]:
        self.scheduler.drain(name)
        return []

    def _lose(self, name: str) -> list[str]:
        return [f"{request.request_id} waits" for request in self.scheduler.lose(name)]

    def _show(self) -> list[str]:
        free = [f"{e.executor_id}: {e.blocks.free_count} blocks free" for e in self.scheduler.executors.values()]
        return [f"{r.request_id} {r.state.value}, {r.output_count} tokens" for r in self.requests.values()] + free


def describe(plan: Plan) -> list[str]:
    """A plan, a line for each thing that it says."""
    lines = [f"step {plan.step}"]
    lines += [f"drop slot {slot}" for slot in plan.dropped_slots]
    for new in plan.new_requests:
        known = f"{len(new.token_ids)} tokens, {new.output_count} of them output"
        lines.append(f"start {new.request_id} in slot {new.slot}: {known}, blocks {list(new.block_ids)}")
    lines += [f"append block {block} to slot {slot}" for slot, block in plan.appended]
    lines += [f"pause slot {slot}" for slot in plan.paused_slots]
    for chunk in plan.chunks:
        span = f"[{chunk.start},{chunk.start + chunk.count})"
        lines.append(f"{chunk.request.request_id} computes {span}{' and samples' if chunk.samples else ''}")
    chunked = {chunk.slot for chunk in plan.chunks}
    decoding = [
        request.request_id
        for slot, request in zip(plan.row_slots.tolist(), plan.rows, strict=True)
        if slot not in chunked
    ]
    return lines + ([f"decode {' '.join(decoding)}"] if decoding else [])


def replay(text: str) -> str:
    """Play the commands of a scenario and write down what happens now."""
    stage = Stage()
    written = []
    for block in text.strip().split("\n\n"):
        command = block.splitlines()[0]
        if command.startswith("#"):
            written.append(block)
            continue
        written.append("\n".join([command, "----", *stage.play(command)]))
    return "\n\n".join(written) + "\n"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_scheduler_decides_as_written(path):
    """The scheduler's behaviour is a document that people read; it must not drift from what it does."""
    text = path.read_text()
    happened = replay(text)
    if os.environ.get("UPDATE_SCENARIOS"):
        path.write_text(happened)

    assert happened == path.read_text()
