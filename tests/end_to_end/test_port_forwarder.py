"""The scheduler behind a port forwarder, which takes connections also while the scheduler is away.

`kubectl port-forward` and the proxy of docker do. A client then sees a connection that comes and goes, where without
them it would be refused.
"""

import asyncio
import json

import pytest

from paceline import AsyncClient
from tests.chaos.proxy import Proxy, WhenAway
from tests.end_to_end.processes import until
from tests.scheduler_svc.test_service import expected_text

SLOW = ("--fake-step-us", "10000")
PROMPT_COUNT = 12
TOKEN_COUNT = 200

# Connections in vain that an outage lasts: more than there are retries; each that hangs takes five seconds.
VAIN_COUNT = {WhenAway.CLOSE: 7, WhenAway.RESET: 7, WhenAway.HANG: 2}


@pytest.fixture
async def forwarder(services, request):
    async with Proxy(services.address, when_away=getattr(request, "param", WhenAway.CLOSE)) as forwarder:
        yield forwarder


@pytest.fixture
async def scheduler(services):
    scheduler = await services.scheduler(journal=True)
    await services.executor("e0", *SLOW)
    return scheduler


def begin_batch(services, forwarder):
    """Start `paceline generate --input`; returns it and the file that it will write."""
    prompts, answers = services.folder / "prompts.txt", services.folder / "answers.jsonl"
    prompts.write_text("".join(f"prompt {index}\n" for index in range(PROMPT_COUNT)))
    files = ("--input", str(prompts), "--output", str(answers))
    limits = ("--max-tokens", str(TOKEN_COUNT))
    return services.command("generate", "--server", forwarder.address, *files, *limits), answers


async def assert_whole(batch, answers):
    """Wait for its end; every prompt must have the answer that it gets when nothing happens."""
    assert await batch.exit_code() == 0, batch.printed
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [line.get("text") for line in lines] == [
        expected_text(f"prompt {index}", TOKEN_COUNT) for index in range(PROMPT_COUNT)
    ]


async def outage(services, forwarder, scheduler, vain_count):
    """Kill the scheduler, and start it on the same journal once so many connections were in vain."""
    scheduler.kill()
    await until(lambda: passed(forwarder.vain_count >= vain_count), "nobody looks for the scheduler any more")
    await services.again(scheduler).has_printed("scheduler ready")


async def passed(condition):
    return condition


@pytest.mark.parametrize("forwarder", WhenAway, ids=lambda way: way.value, indirect=True)
async def test_a_batch_and_streams_outlive_the_scheduler_behind_a_forwarder(services, forwarder, scheduler, request):
    """What was computed for hours must not be lost because somebody else answered the phone for a while."""

    async def batch_runs():
        return (await services.executors())["e0"].running_request_count

    batch, answers = begin_batch(services, forwarder)
    await until(batch_runs, "the batch does not run")
    async with AsyncClient(forwarder.address) as client:
        streams = [client.generate(f"mine {index}", max_output_tokens=TOKEN_COUNT) for index in range(3)]
        for stream in streams:
            await anext(stream)
        vain_count = VAIN_COUNT[request.node.callspec.params["forwarder"]]
        reading = [asyncio.create_task(stream.result()) for stream in streams]
        await outage(services, forwarder, scheduler, vain_count)

        outputs = await asyncio.gather(*reading)
    assert [output.text for output in outputs] == [
        expected_text(f"mine {index}", TOKEN_COUNT) for index in range(len(outputs))
    ]
    await assert_whole(batch, answers)


async def test_a_batch_whose_connection_never_came_about_waits_too(services, forwarder, scheduler):
    """It dialled, somebody took the call, and the scheduler was gone before it had said a word."""
    scheduler.kill()
    batch, answers = begin_batch(services, forwarder)
    await outage(services, forwarder, scheduler, VAIN_COUNT[WhenAway.CLOSE])

    await assert_whole(batch, answers)


async def test_a_stream_that_the_scheduler_had_not_confirmed_is_asked_for_again(services, forwarder, scheduler):
    """Killed between the request and the first word of its answer: who has it is unknown, and its id makes it safe."""
    async with AsyncClient(forwarder.address) as client:
        scheduler.suspend()
        stream = asyncio.create_task(client.generate("mine", max_output_tokens=TOKEN_COUNT, stream=False))
        await until(lambda: passed(forwarder.connection_count), "the request was not sent")
        await outage(services, forwarder, scheduler, VAIN_COUNT[WhenAway.CLOSE])

        assert (await stream).text == expected_text("mine", TOKEN_COUNT)
