"""Real processes that are killed, drained and started wrongly while users stream from them. No model."""

import asyncio
import math
import time

import pytest

from paceline import AsyncClient, InvalidRequest, Unavailable
from paceline.v1 import fleet_pb2
from tests.end_to_end.processes import REPOSITORY, until
from tests.scheduler_svc.test_service import expected_text

SLOW = ("--fake-step-us", "20000")


@pytest.fixture
async def client(services):
    async with AsyncClient(services.address, timeout_s=120) as client:
        yield client


async def begin(client, count, output_count):
    """Start requests and read the first chunks of each; returns (prompt, stream) pairs."""
    streams = [(f"prompt {n}", client.generate(f"prompt {n}", max_output_tokens=output_count)) for n in range(count)]
    for _, stream in streams:
        for _ in range(3):
            await anext(stream)
    return streams


async def assert_undisturbed(streams, output_count):
    """Read all streams to their end; each must have the text that its prompt gets when nothing happens."""
    outputs = await asyncio.gather(*(stream.result() for _, stream in streams))
    for (prompt, _), output in zip(streams, outputs, strict=True):
        assert output.text == expected_text(prompt, output_count)
    return outputs


async def test_cancelled_streams_leave_nothing_behind(services, client):
    """Users go away all the time; a block that leaks with each of them would end the service in a day."""
    size = ("--fake-block-count", "200", "--max-num-seqs", "24", "--fake-step-us", "2000")
    await services.scheduler()
    await services.executor("e0", *size)
    await services.executor("e1", *size)

    async def stream_to(index):
        leaves = index % 2
        stream = client.generate(f"prompt {index}", max_output_tokens=2000 if leaves else 60)
        async with stream:
            async for _ in stream:
                if leaves and len(stream.text) > 20:
                    break
        return stream

    streams = await asyncio.gather(*(stream_to(index) for index in range(64)))
    await until(services.is_idle, "something is left of the cancelled requests")
    late = await client.generate("late", max_output_tokens=20, stream=False)

    for index, stream in enumerate(streams):
        whole = expected_text(f"prompt {index}", 60)
        if index % 2:
            assert 20 < len(stream.text) < 2000
            assert stream.text[:60] == whole[: len(stream.text)]
        else:
            assert stream.output.text == whole
    assert late.text == expected_text("late", 20)
    assert len(await services.executors()) == 2


async def test_streams_go_on_when_one_of_two_executors_is_killed(services, client):
    """Nothing dies with a process: no token is lost or repeated, the user sees a pause."""
    await services.scheduler()
    victim = await services.executor("e0", *SLOW)
    await services.executor("e1", *SLOW)
    streams = await begin(client, 12, 150)
    running = {name: executor.running_request_count for name, executor in (await services.executors()).items()}
    victim.kill()
    outputs = await assert_undisturbed(streams, 150)

    assert min(running.values()) > 0, "an executor had nothing to do"
    assert [output.usage.recomputation_count for output in outputs].count(1) == running["e0"]
    assert await services.state_of("e0") != fleet_pb2.EXECUTOR_STATE_READY


async def test_streams_wait_for_a_new_executor_when_the_only_one_is_killed(services, client):
    """An accepted request outlives every executor there is."""
    await services.scheduler()
    victim = await services.executor("e0", *SLOW)
    streams = await begin(client, 8, 100)
    victim.kill()

    async def all_wait():
        return (await services.fleet()).waiting_request_count == 8

    await until(all_wait, "the requests do not wait")
    await services.executor("e1", *SLOW)
    outputs = await assert_undisturbed(streams, 100)

    assert [output.usage.recomputation_count for output in outputs] == [1] * 8


async def test_a_killed_executor_comes_back_under_its_own_name(services, client):
    """What restarts a process uses its old address and id; the scheduler must not take it for the dead one."""
    await services.scheduler()
    victim = await services.executor("e0", *SLOW)
    streams = await begin(client, 4, 100)
    victim.kill()
    await services.executor("e0", *SLOW)
    outputs = await assert_undisturbed(streams, 100)

    assert [output.usage.recomputation_count for output in outputs] == [1] * 4


async def test_a_stopped_executor_finishes_what_runs_there(services, client):
    """SIGTERM is how executors are scaled down and replaced, many times a day: it costs nobody anything."""
    await services.scheduler()
    leaver = await services.executor("e0", *SLOW)
    await services.executor("e1", *SLOW)
    streams = await begin(client, 12, 150)
    running_count = (await services.executors())["e0"].running_request_count
    leaver.terminate()

    async def drains():
        return await services.state_of("e0") == fleet_pb2.EXECUTOR_STATE_DRAINING

    await until(drains, "the executor does not drain")
    late = await client.generate("late", max_output_tokens=10, stream=False)
    outputs = await assert_undisturbed(streams, 150)

    assert await leaver.exit_code() == 0
    assert running_count > 0, "nothing ran on the executor that was stopped"
    assert [output.usage.recomputation_count for output in outputs] == [0] * 12
    assert late.text == expected_text("late", 10)
    assert "Traceback" not in leaver.printed

    async def is_gone():
        return list(await services.executors()) == ["e1"]

    await until(is_gone, "the executor is still in the fleet")


async def test_a_stopped_scheduler_finishes_what_runs_and_refuses_what_comes(services, client):
    """A rollout waits for the answers that users are reading; the next requests go to the next scheduler."""
    scheduler = await services.scheduler()
    await services.executor("e0", *SLOW)
    streams = await begin(client, 6, 150)
    scheduler.terminate()
    await scheduler.has_printed("draining")
    async with AsyncClient(services.address, max_retries=0) as impatient:
        with pytest.raises(Unavailable, match="the scheduler is shutting down; retry with backoff"):
            await impatient.generate("late", max_output_tokens=4, stream=False)
    await assert_undisturbed(streams, 150)
    exit_code = await scheduler.exit_code()
    await services.scheduler()

    async def is_ready():
        return await services.state_of("e0") == fleet_pb2.EXECUTOR_STATE_READY

    await until(is_ready, "the executor does not join the next scheduler")
    output = await client.generate("next", max_output_tokens=4, stream=False)

    assert exit_code == 0
    assert "Traceback" not in scheduler.printed
    assert output.text == expected_text("next", 4)


async def test_what_cannot_be_started_says_why_and_disturbs_nobody(services, client, serving_folder, tmp_path):
    """Each of these happens on a first day; the one who typed it must read what to type instead."""
    scheduler = await services.scheduler("--listen", "127.0.0.1:0")
    port = (await scheduler.has_printed(r"127\.0\.0\.1:(\d+)"))[1]
    await services.executor("e0", *SLOW)
    ((prompt, stream),) = await begin(client, 1, 300)
    executor = ("executor", "fake", "--scheduler", services.address)
    mistakes = [
        (
            services.command("scheduler", "fake", "--listen", f"127.0.0.1:{port}"),
            1,
            rf"cannot listen on '127.0.0.1:{port}': port {port} is in use.*\n.*choose another port",
        ),
        (
            services.command("scheduler", "fake", "--listen", services.address),
            1,
            rf"cannot listen on '{services.address}': .* in use.*\n.*choose another",
        ),
        (
            services.command("executor", str(tmp_path), "--scheduler", services.address),
            2,
            rf"'{tmp_path}' is not a serving folder: it has no paceline.json\n.*paceline prepare {tmp_path}",
        ),
        (
            services.command("scheduler", "fake", "--listen", "nowhere"),
            2,
            r"'nowhere' is not an address: give host:port",
        ),
        (
            services.command("scheduler", str(tmp_path / "missing")),
            2,
            rf"'{tmp_path}/missing' is not there, not a serving folder\n.*paceline prepare MODEL",
        ),
        (
            services.command(*executor, "--max-model-len", "100"),
            1,
            r"has the context length 100, the fleet has 8192; start all executors with the same --max-model-len",
        ),
        (
            services.command("executor", str(serving_folder("llama")), *executor[2:], "--threads", "1"),
            1,
            r"has the model 'llama' \(\w{12}\), this scheduler serves 'fake' \(fake\); start both with the same folder",
        ),
    ]

    for process, exit_code, message in mistakes:
        assert await process.exit_code() == exit_code, process.printed
        await process.has_printed(message)
        assert "Traceback" not in process.printed
    assert list(await services.executors()) == ["e0"]
    assert (await stream.result()).text == expected_text(prompt, 300)


@pytest.mark.parametrize(
    ("megabytes", "reason"),
    [
        (5, r"text has 5000000 bytes, the limit is \d+; .*shorten"),
        (80, r"the request has 800000\d\d bytes, the server takes at most 67108864; shorten"),
    ],
    ids=["beyond-the-prompt-limit", "beyond-the-message-limit"],
)
async def test_a_prompt_of_megabytes_is_refused_at_once_and_stops_nobody(services, client, megabytes, reason):
    """One user who sends a whole disk must hear that it is too much, while all others go on."""
    await services.scheduler()
    await services.executor("e0")
    script = (
        "import sys, paceline\n"
        "with paceline.Client(sys.argv[1]) as client:\n"
        "    client.generate('x' * (1_000_000 * int(sys.argv[2])), max_output_tokens=4, stream=False)\n"
    )
    sender = services.run("-c", script, services.address, str(megabytes))
    longest_s, served_count = 0.0, 0
    while not sender.has_ended:
        begun = time.monotonic()
        output = await client.generate("others", max_output_tokens=2, stream=False)
        longest_s, served_count = max(longest_s, time.monotonic() - begun), served_count + 1
        assert output.text == expected_text("others", 2)
    begun = time.monotonic()
    with pytest.raises(InvalidRequest, match=reason):
        await client.generate("x" * (1_000_000 * megabytes), max_output_tokens=4, stream=False)

    assert time.monotonic() - begun < 10
    assert await sender.exit_code() == 1
    await sender.has_printed("InvalidRequest: ")
    assert served_count > 3
    assert longest_s < 3


async def test_a_request_that_makes_no_sense_is_refused_with_its_field(services, client):
    """The SDK hands the server's words on: the field, the value, the limit."""
    await services.scheduler()
    await services.executor("e0")
    mistakes = [
        ("x", {"temperature": math.nan}, "temperature is nan, must be 0 to 100"),
        ("x", {"temperature": 0.0, "top_k": 5}, "top_k is 5 but temperature is 0"),
        ("x", {"max_output_tokens": 9000}, "max_output_tokens is 9000, but .* the context length is 8192"),
        ([1, 2, 257], {}, "token_ids contains 257, but the vocabulary ends at 256"),
        ("", {}, "text gives an empty prompt"),
    ]

    for prompt, options, reason in mistakes:
        with pytest.raises(InvalidRequest, match=reason):
            await client.generate(prompt, stream=False, **options)
    assert (await client.generate("x", max_output_tokens=3, stream=False)).text == expected_text("x", 3)


@pytest.mark.parametrize(
    ("name", "arguments", "promise"),
    [
        ("stream", ["How are you?"], r".{100,}\n\n\d+ \+ 200 tokens, the first after \d+ ms, all after \d+ ms\n"),
        ("batch", ["12"], r"12 of 12\n768 tokens in \d+\.\d\d s: \d+ tokens/s\n"),
    ],
    ids=["stream", "batch"],
)
async def test_an_example_runs_and_is_short(services, name, arguments, promise):
    """Examples are copied first and read later: they must work as they are."""
    file = REPOSITORY / "examples" / f"{name}.py"
    await services.scheduler()
    await services.executor("e0")
    example = services.run(str(file), *arguments, services.address)

    assert await example.exit_code() == 0, example.printed
    await example.has_printed(promise)
    assert len(file.read_text().splitlines()) < 40
