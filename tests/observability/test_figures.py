"""What Prometheus says of a run is what the run did: a figure that is there may still be wrong."""

import asyncio
import re
import time
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace

import grpc
import pytest
import yaml

from common.processes import ANY_PORT
from tests.observability.prometheus import (
    ROOT,
    expressions,
    may_be_empty,
    of_each_executor,
    program,
    running_prometheus,
    short_config,
)
from tests.system import FAST, request, started

ONE_AT_A_TIME = replace(FAST, max_num_seqs=1, metrics_port=ANY_PORT)
SOON_S = 60.0


class Watched:
    """A system, and a Prometheus that has looked at it before anything happened."""

    def __init__(self, system, prometheus):
        self.system = system
        self._prometheus = prometheus

    async def ask(self, expr):
        """The series of an expression, by their labels without those that Prometheus puts there."""
        found = await asyncio.to_thread(self._prometheus.query, expr)
        return {"/".join(v for k, v in one["metric"].items() if k not in PUT_THERE): one for one in found}

    async def values(self, expr):
        """The same, as numbers."""
        return {labels: float(one["value"][1]) for labels, one in (await self.ask(expr)).items()}

    async def until(self, expr, expected):
        """Wait until the expression is that; scrapes come by the second."""
        until = time.monotonic() + SOON_S
        while (found := await self.values(expr)) != expected and time.monotonic() < until:
            await asyncio.sleep(0.1)
        assert found == expected

    async def ended(self, count):
        """Wait until so many requests have ended, and everything has been scraped once more."""
        await self.until("sum(paceline_requests_ended_total)", {"": count})
        (seen,) = (await self.values("timestamp(paceline_plans_total)")).values()
        until = time.monotonic() + SOON_S
        while (await self.values("timestamp(paceline_plans_total)"))[""] <= seen and time.monotonic() < until:
            await asyncio.sleep(0.1)


PUT_THERE = {"job", "instance", "__name__"}


@asynccontextmanager
async def watching(folder, executor_count=1, executor=ONE_AT_A_TIME, more_jobs=()):
    """A system that is watched."""
    program("prometheus")
    async with started(executor_count, executor=executor) as system:
        pages = system.app.pages()
        port = pages.start(ANY_PORT, "127.0.0.1")
        with ExitStack() as stack:
            config = short_config(f"127.0.0.1:{port}")
            for job in more_jobs:
                config["scrape_configs"].append(job | {"static_configs": [{"targets": [f"127.0.0.1:{port}"]}]})
            running = running_prometheus(config, folder)
            watched = Watched(system, await asyncio.to_thread(stack.enter_context, running))
            target_count = 1 + len(more_jobs) + (executor_count if executor.metrics_port else 0)
            await watched.until("sum(up)", {"": target_count})
            yield watched
        pages.stop()


async def answer(system, *words, **fields):
    """The last message of a request."""
    async for message in system.generate(request(*words, **fields)):
        last = message
    return last


def panel(title):
    """The first expression of a panel."""
    (expr,) = [expr for where, expr in expressions("1m") if f": {title} [A]" in where]
    return expr


async def test_outcomes_refusals_and_the_hit_rate_are_those_of_the_run(tmp_path):
    """An operator acts on them; whoever sent the requests knows better."""
    async with watching(tmp_path) as watched:
        prompt = "the same beginning, again and again "
        messages = [await answer(watched.system, f"{prompt}{number}", 4) for number in range(6)]
        usages = [message.usage for message in messages]
        await watched.ended(6)
        rate = await watched.values(panel("How much of the prompts need not be computed?"))
        for _ in range(2):
            call = watched.system.generate(request("hello", 200))
            await call.read()
            call.cancel()
        with pytest.raises(grpc.aio.AioRpcError, match="temperature"):
            await answer(watched.system, temperature=-1)

        reused, placed = (sum(getattr(one, f"{kind}prompt_token_count") for one in usages) for kind in ("cached_", ""))
        assert reused > placed / 2
        assert rate == {"": pytest.approx(reused / placed)}
        await watched.until(
            "sum by (outcome) (paceline_requests_ended_total)",
            {"stop": 0, "length": 6, "cancelled": 2, "deadline": 0, "error": 0, "cut_off": 0},
        )
        await watched.until("sum by (reason) (paceline_requests_refused_total) > 0", {"invalid": 1})
        await watched.until("sum(paceline_requests_arrived_total)", {"": 8})


async def test_the_age_of_the_queue_is_the_time_that_somebody_has_waited(tmp_path):
    """The alert on it wakes people: it must begin when the wait does, and end with it."""
    slow = replace(ONE_AT_A_TIME, fake_step_us=200_000)
    async with watching(tmp_path, executor=slow) as watched:
        first, second = (watched.system.generate(request("hello", 200, request_id=name)) for name in ("runs", "waits"))
        await first.read()
        sent_at = time.time()
        await second.read()  # which says that it is accepted
        accepted_at = time.time()
        selector = "paceline_oldest_waiting_seconds"
        until = time.monotonic() + SOON_S
        while (await watched.values(selector))[""] < 1.0 and time.monotonic() < until:
            await asyncio.sleep(0.1)
        samples = [(float(at), float(age)) for at, age in (await watched.ask(f"{selector}[1m]"))[""]["values"]]
        asked_at = time.time()
        first.cancel()
        second.cancel()

        assert (await watched.values(panel("For how long?")))[""] >= 1.0
        age = samples[-1][1]
        assert samples[-1][0] - accepted_at - 0.01 <= age <= asked_at - sent_at
        await watched.until(f"max({selector})", {"": 0})


async def test_the_idle_share_is_the_one_that_the_scheduler_has_measured(tmp_path):
    """It is the price of the split into services, and the budget for it is a few percent."""
    async with watching(tmp_path, 2, replace(ONE_AT_A_TIME, fake_step_us=5000)) as watched:
        await asyncio.gather(*(answer(watched.system, f"{number}", 40) for number in range(6)))
        await watched.ended(6)
        meters = {name: member.link.steps for name, member in watched.system.app.fleet.members.items()}
        shares = await watched.values(panel("Does an executor wait for the scheduler?"))

        expected = {name: steps.starved_s / (steps.starved_s + steps.total.busy) for name, steps in meters.items()}
        assert shares == pytest.approx(expected)
        assert set(expected) == {"e0", "e1"}
        assert all(0 <= share < 0.9 for share in shares.values())


async def test_an_executor_that_goes_is_one_recovery_and_who_was_on_it_one_move(tmp_path):
    """Counted twice, every loss would look like two, and a restart like an outage."""
    async with watching(tmp_path, 2, replace(ONE_AT_A_TIME, fake_step_us=20_000)) as watched:
        call = watched.system.generate(request("hello", 40, request_id="r"))
        await call.read()
        (where,) = [name for name, one in watched.system.scheduler.executors.items() if one.running]
        (task,) = [task for task in watched.system.tasks if task.get_name() == where]
        task.cancel()
        async for message in call:
            last = message

        assert last.output_token_count == 40
        await watched.until("sum by (kind) (paceline_recoveries_total) > 0", {"replanned": 1})
        await watched.until("sum by (cause) (paceline_moves_total) > 0", {"lost": 1})
        await watched.until('sum(paceline_requests_ended_total{outcome="length"})', {"": 1})


def documented(language, key):
    """What an example in the handbook says under a key."""
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs/operations.md").read_text(), re.DOTALL)
    (found,) = [block for block in map(yaml.safe_load, blocks) if key in block]
    return found[key]


async def test_queries_made_for_vllm_are_answered_as_the_handbook_says(tmp_path):
    """Who comes from there has dashboards and KEDA triggers already: by `model_name`, or by `model`."""
    (job,), (trigger,) = documented("yaml", "scrape_configs"), documented("yaml", "triggers")
    waiting = trigger["metadata"]["query"].replace("SmolLM2-135M-Instruct", "fake")
    slow = replace(FAST, max_num_seqs=1, fake_step_us=200_000)
    async with watching(tmp_path, executor=slow, more_jobs=[job]) as watched:
        await answer(watched.system, "hello", 4, choice_count=3)
        await answer(watched.system, "hello", 2)
        calls = [watched.system.generate(request("hello", 200)) for _ in range(3)]
        await asyncio.gather(*(call.read() for call in calls))

        await watched.until(f"{waiting} > 0", {"0/fake/fake": 2})
        await watched.until('vllm:request_max_num_generation_tokens_sum{model_name="fake"}', {"0/fake/fake": 4 + 2})
        await watched.until('vllm:request_generation_tokens_sum{model_name="fake"}', {"0/fake/fake": 3 * 4 + 2})
        await watched.until('vllm:request_inference_time_seconds_count{engine="0"}', {"0/fake/fake": 2})
        took = await watched.values("vllm:request_inference_time_seconds_sum <= vllm:e2e_request_latency_seconds_sum")
        assert took["0/fake/fake"] > 0
        for call in calls:
            call.cancel()


async def test_every_process_has_a_curve_of_its_own(tmp_path):
    """A panel with the curves of some looks like one in which the others are fine."""
    async with watching(tmp_path, 2) as watched:
        await asyncio.gather(*(answer(watched.system, f"{number}", 40) for number in range(6)))
        await watched.ended(6)
        memory = await watched.ask(panel("How much memory do processes take?"))
        shown = {where: await watched.ask(expr) for where, expr in of_each_executor() if not may_be_empty(where, expr)}

        assert len(shown) >= 8
        for where, found in shown.items():
            executors = {one["metric"].get("executor_id") for one in found.values()}
            assert executors >= {"e0", "e1"}, where
        jobs = [one["metric"]["job"] for one in memory.values()]
        assert sorted(jobs) == ["paceline-executor", "paceline-executor", "paceline-scheduler"]
