"""Scenarios as text: each file in `scenarios/` shows commands and exactly what the scheduler decided.

A file's name is its claim. After a change that is meant, rewrite them with `UPDATE_SCENARIOS=1` and review the
difference like code.

    policy deadline                                  before anything else; fifo when left out
    usually 0.1                                      requests so far generated a tenth of what they might have
    executor e blocks=4 block=4 slots=4 tokens=16    an executor joins; more layer groups: window=8 or chunk=8
    add a prompt=7 output=4 stop=9 deadline=5        a request arrives (stop: a stop token; both may be left out)
        likes=b shares=5                             ... whose prompt begins with the first 5 tokens of b's
        choices=2 salt=x priority=1 tenant=t
    plan e now=1                                     what the next step computes
    result e 1 2 fail=0:why seconds=1                its tokens, one for each row; -1 for none; failed slots
    cancel a | finish a 2 | expire 5 | drain e | lose e | show
"""

import os
from array import array
from pathlib import Path

import pytest

from scheduler_svc.core.layer_groups import NO_BLOCK, LayerGroup
from scheduler_svc.core.plan import Capacity, NeverFitsError, Plan, Result
from scheduler_svc.core.policies import make_policy
from scheduler_svc.core.request import FinishReason, Request, with_choices
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

    def _policy(self, name: str) -> list[str]:
        self.scheduler = Scheduler(make_policy(name))
        return []

    def _usually(self, share: str) -> list[str]:
        for _ in range(400):
            self.scheduler._placement.lengths.note_ended(round(float(share) * 1000), 1000)
        return []

    def _executor(self, name: str, blocks: str, block: str = "4", slots: str = "4", tokens: str = "16", **more: str):
        groups = [LayerGroup(int(block))]
        groups += [LayerGroup(int(block), **{limit: int(size)}) for limit, size in more.items()]
        self.scheduler.join(name, Capacity(tuple(groups), int(blocks), int(slots), int(tokens)))
        return []

    def _add(self, name: str, prompt: str, output: str, **more: str) -> list[str]:
        first = 100 * len(self.requests)  # no two prompts begin alike unless they say so
        token_ids = array("I", range(first, first + int(prompt)))
        if "likes" in more:
            shared = int(more["shares"])
            token_ids[:shared] = self.requests[more["likes"]].token_ids[:shared]
        request = Request(
            name,
            token_ids,
            int(prompt),
            int(output),
            stop_token_ids=frozenset({int(more["stop"])}) if "stop" in more else frozenset(),
            deadline=float(more.get("deadline", "inf")),
            priority=int(more.get("priority", 0)),
            tenant=more.get("tenant", ""),
            cache_salt=more.get("salt", ""),
        )
        try:
            self.scheduler.add(with_choices(request, int(more.get("choices", 1))))
        except NeverFitsError as error:
            return [f"refused: {error}"]
        self.requests |= {name_of(choice): choice for choice in request.family}
        return []

    def _plan(self, name: str, now: str = "0") -> list[str]:
        before = {request: request.placement_count for request in self.requests.values() if request.executor}
        plan = self.scheduler.plan(name, float(now))
        gone = [request for request in before if request.executor is None]
        preempted = [f"preempt {name_of(request)}" for request in gone]
        return preempted + (describe(plan) if plan else ["nothing"])

    def _result(self, name: str, *tokens: str, fail: str = "", seconds: str = "0") -> list[str]:
        errors = {int(fail.split(":")[0]): fail.split(":")[1]} if fail else {}
        step = self.scheduler.executors[name].in_flight[0].step
        result = Result(step, [int(token) for token in tokens], errors, float(seconds))
        outputs = self.scheduler.apply(name, result)
        ended = [f"{name_of(request)} finished {request.finish_reason.value}" for request in outputs.finished]
        return [f"{name_of(request)} {token}" for request, token in outputs.tokens] + ended

    def _cancel(self, name: str) -> list[str]:
        self.scheduler.cancel(self.requests[name])
        return self._show()

    def _finish(self, name: str, output_count: str) -> list[str]:
        self.scheduler.finish(self.requests[name], int(output_count), FinishReason.STOP)
        return self._show()

    def _expire(self, now: str) -> list[str]:
        return [f"{name_of(request)} expired" for request in self.scheduler.expire(float(now))]

    def _drain(self, name: str) -> list[str]:
        self.scheduler.drain(name)
        return []

    def _lose(self, name: str) -> list[str]:
        return [f"{name_of(request)} waits" for request in self.scheduler.lose(name)]

    def _show(self) -> list[str]:
        requests = [f"{name_of(r)} {r.state.value}, {r.output_count} tokens" for r in self.requests.values()]
        pools = [(e.executor_id, e.cache.pool) for e in self.scheduler.executors.values()]
        return requests + [f"{name}: {free_blocks(pool.free_count, pool.reusable_count)}" for name, pool in pools]


def free_blocks(free_count: int, reusable_count: int) -> str:
    return f"{free_count} blocks free" + (f", {reusable_count} of them reusable" if reusable_count else "")


def name_of(request: Request) -> str:
    """Its id, with the number of the choice where there are several."""
    return f"{request.request_id}/{request.choice}" if request.choices else request.request_id


def describe(plan: Plan) -> list[str]:
    """A plan, a line for each thing that it says."""
    lines = [f"step {plan.step}"]
    lines += [f"drop slot {slot}" for slot in plan.dropped_slots]
    lines += [f"copy block {source} to {destination}" for source, destination in plan.copies]
    starting = {chunk.slot: chunk.request for chunk in plan.chunks}
    for new in plan.new_requests:
        known = f"{len(new.token_ids)} tokens, {new.output_count} of them output"
        known += f", {new.computed_count} of them computed" if new.computed_count else ""
        tables = " and ".join(str([block if block != NO_BLOCK else None for block in t]) for t in new.block_tables)
        lines.append(f"start {name_of(starting[new.slot])} in slot {new.slot}: {known}, blocks {tables}")
    for slot, group, block in plan.appended:
        named = f"block {block}" if block != NO_BLOCK else "no block"
        lines.append(f"append {named} to slot {slot}" + (f" in layer group {group}" if group else ""))
    lines += [f"slot {slot} adopts {count} tokens" for slot, count in plan.adopted]
    lines += [f"pause slot {slot}" for slot in plan.paused_slots]
    lines += [f"skip slot {slot}" for slot in plan.skipped_slots]
    for chunk in plan.chunks:
        span = f"[{chunk.start},{chunk.start + chunk.count})"
        lines.append(f"{name_of(chunk.request)} computes {span}{' and samples' if chunk.samples else ''}")
    chunked = {chunk.slot for chunk in plan.chunks}
    decoding = [
        name_of(request)
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
