"""Readers that leave: the server hears of it at once, by `Cancel`, for the end of a call alone may be a broken line."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from queue import Empty

import grpc
import pytest

from paceline import AsyncClient, Cancelled, Client, InvalidRequest
from paceline._batch import Batch
from paceline._calls import Attempts
from tests.client.scripted_server import ACCEPTED, BROKEN, HELLO, Action, Fail, ScriptedServer, Wait, answered, failed


def unfinished() -> tuple[Action, ...]:
    """One piece of an answer, and no end."""
    return (*HELLO[:2], Wait())


def ids_of(batch: list) -> list[str]:
    return [message.request.request_id for message in batch]


def wait_until_asked(server: ScriptedServer) -> None:
    deadline = time.monotonic() + 10
    while not (server.requests or server.batches):
        assert time.monotonic() < deadline, "nobody asked"
        time.sleep(0.01)


def test_leaving_the_with_cancels_by_id(client, server):
    """Nobody pays for tokens that nobody reads, not even for the half minute that a broken line is given."""
    server.scripts.append(unfinished())
    with client.generate("Say hello", request_id="mine") as stream:
        next(stream)

    assert server.cancels.get(timeout=10) == "mine"
    assert server.broken_off.get(timeout=10)


def test_cancels_once_however_often_it_is_closed(client, server):
    """`close`, the end of the `with`, of the client and of the object are all one leaving."""
    server.scripts.append(unfinished())
    with client.generate("Say hello", request_id="mine") as stream:
        next(stream)
        stream.close()
        stream.close()
    with pytest.raises(Cancelled):
        next(stream)
    del stream
    client.close()

    assert server.cancelled_ids == ["mine"]


def test_leaving_before_the_first_message_cancels_too(client, server):
    """The request may be in the queue by then."""
    server.scripts.append((Wait(),))
    stream = client.generate("Say hello", request_id="mine")
    wait_until_asked(server)
    stream.close()

    assert server.cancels.get(timeout=10) == "mine"


def test_dropping_the_stream_cancels_by_id(client, server):
    """A `break` out of a plain `for` leaves no request behind."""
    server.scripts.append(unfinished())
    for _ in client.generate("Say hello", request_id="mine"):
        break
    gc.collect()
    client.close()

    assert server.cancels.get(timeout=10) == "mine"


def test_a_stream_that_ended_is_not_cancelled(client, server):
    """In order, with an error, or given up: there is nothing to cancel, and the call would be in vain."""
    server.scripts.extend([HELLO, (*HELLO[:2], Fail(grpc.StatusCode.INTERNAL)), (Fail(grpc.StatusCode.INTERNAL),)])
    with client.generate("Say hello") as stream:
        list(stream)
    for _ in range(2):
        with pytest.raises(Exception, match="as scripted"):
            list(client.generate("Say hello"))
    client.generate("Say hello", stream=False)
    client.generate_batch(["a", "b"])
    client.close()

    assert server.cancelled_ids == []


def test_leaving_after_the_last_chunk_is_not_cancelling(client, server):
    """The answer is whole, whether or not the reader asked for what comes after it."""
    with client.generate("Say hello") as stream:
        for chunk in stream:
            if chunk.usage:
                break
    client.close()

    assert server.cancelled_ids == []


def test_without_a_detach_time_out_the_end_of_the_call_is_enough(connect, server):
    """The server cancels such a request by itself."""
    server.scripts.append(unfinished())
    client = connect(detach_timeout_s=0)
    with client.generate("Say hello") as stream:
        next(stream)
    client.close()

    assert server.broken_off.get(timeout=10)
    assert server.cancelled_ids == []


def test_closing_the_client_cancels_what_still_runs(connect, server):
    """Its requests would otherwise run on, with nobody left who could read them."""
    server.scripts.extend([unfinished(), HELLO, unfinished()])
    client = connect()
    streams = []
    for name in ("a", "b", "c"):
        streams.append(client.generate("Say hello", request_id=name))
        next(streams[-1])
    list(streams[1])
    client.close()

    assert sorted(server.cancelled_ids) == ["a", "c"]
    with pytest.raises(Cancelled):
        next(streams[0])


def test_closing_a_stream_that_looks_for_its_server_ends_the_search(server: ScriptedServer):
    """A user who gives up must not be kept, and when the server is back soon it still hears of it."""
    server.scripts.append(unfinished())
    with Client(server.target) as client:
        stream = client.generate("Say hello", request_id="mine")
        next(stream)
        server.stop()
        threading.Timer(0.3, stream.close).start()
        threading.Timer(0.6, server.start).start()

        with pytest.raises(Cancelled):
            next(stream)
        assert server.cancels.get(timeout=10) == "mine"


def test_leaving_while_the_server_is_away_takes_no_longer_than_a_cancel(connect, server, monkeypatch):
    """The server will find out by itself."""
    monkeypatch.setattr("paceline._cancels.CANCEL_TIMEOUT_S", 0.3)
    server.scripts.append(unfinished())
    client = connect()
    stream = client.generate("Say hello")
    next(stream)
    server.stop()
    begun = time.monotonic()
    stream.close()
    client.close()

    assert time.monotonic() - begun < 8


def test_ctrl_c_cancels_by_id(server: ScriptedServer):
    """Also without a `with`: who presses it wants it to end."""
    server.scripts.append((ACCEPTED, Wait()))
    with Client(server.target) as client:
        stream = client.generate("Say hello", request_id="mine")
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()

        with pytest.raises(KeyboardInterrupt):
            next(stream)
        assert server.cancels.get(timeout=10) == "mine"


def test_ctrl_c_while_it_looks_for_the_server_ends_the_search(server: ScriptedServer):
    """The wait between two attempts is as good a moment as any."""
    server.scripts.append((*HELLO[:2], BROKEN))
    server.scripts.extend([(Fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after_s=20),)])
    with Client(server.target) as client:
        stream = client.generate("Say hello", request_id="mine")
        threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT)).start()

        with pytest.raises(KeyboardInterrupt):
            list(stream)
        assert server.cancels.get(timeout=10) == "mine"


@pytest.mark.parametrize("is_away", [False, True])
async def test_cancelling_the_reading_task_cancels_by_id(server: ScriptedServer, is_away: bool):
    """Web frameworks cancel the task of a user who went away, whatever it is waiting for."""
    server.scripts.append(unfinished())
    async with AsyncClient(server.target) as client:

        async def read() -> None:
            async for _ in client.generate("Say hello", request_id="mine"):
                if is_away:
                    await asyncio.to_thread(server.stop)
                    threading.Timer(0.6, server.start).start()

        task = asyncio.create_task(read())
        await asyncio.sleep(0.4)
        task.cancel()

        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.cancels.get, timeout=10) == "mine"


LEAVING_PROGRAMS = {
    "break": """
from paceline import Client
client = Client(TARGET)
for chunk in client.generate("Say hello"):
    break
""",
    "ctrl-c": """
import os, signal, threading
from paceline import Client
client = Client(TARGET)
try:
    for chunk in client.generate("Say hello"):
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
except KeyboardInterrupt:
    pass
""",
    "async with": """
import asyncio
from paceline import AsyncClient
async def main():
    async with AsyncClient(TARGET).generate("Say hello") as stream:
        async for chunk in stream:
            break
asyncio.run(main())
""",
    "async ctrl-c": """
import asyncio, os, signal, threading
from paceline import AsyncClient
async def main():
    async for chunk in AsyncClient(TARGET).generate("Say hello"):
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    asyncio.run(main())
except KeyboardInterrupt:
    pass
""",
}


@pytest.mark.parametrize("program", LEAVING_PROGRAMS.values(), ids=LEAVING_PROGRAMS)
def test_a_program_that_ends_at_once_still_says_so(server: ScriptedServer, program: str):
    """Most scripts close no client; they must neither lose the `Cancel` nor end with a complaint of Python's."""
    server.scripts.append(unfinished())
    script = program.replace("TARGET", repr(server.target))
    ended = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=60)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert server.cancels.get(timeout=10) == server.requests[0].request_id


def test_a_program_that_drops_a_stream_at_its_end_ends_quietly(server: ScriptedServer):
    """The event loop is gone when the stream is collected; the server's time-out does the rest."""
    server.scripts.append(unfinished())
    script = f"""
import asyncio
from paceline import AsyncClient
async def main():
    stream = AsyncClient({server.target!r}).generate("Say hello")
    await anext(stream)
    return stream
stream = asyncio.run(main())
"""
    ended = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=60)

    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_batch_that_fails_cancels_what_is_open(client, server):
    """The first error ends it: the rest would be computed for nobody."""
    server.batch_scripts.append(
        lambda messages: [answered(messages[0]), failed(messages[1], grpc.StatusCode.INVALID_ARGUMENT)]
    )
    with pytest.raises(InvalidRequest):
        client.generate_batch(["a", "b", "c", "d"])
    client.close()

    assert set(server.cancelled_ids) >= set(ids_of(server.batches[0])[2:])
    assert ids_of(server.batches[0])[0] not in server.cancelled_ids


def test_a_batch_that_its_caller_stops_cancels_what_is_open(client, server):
    """An exception of the progress callback is the caller's way to stop."""

    def stop(done: int, total: int) -> None:
        raise LookupError("enough")

    with pytest.raises(LookupError):
        client.generate_batch(["a", "b"], on_progress=stop)
    client.close()

    assert server.cancelled_ids == ids_of(server.batches[0])[1:]


def test_ctrl_c_cancels_a_batch(server: ScriptedServer):
    """The signal may come while it waits for an output."""
    server.batch_scripts.append(lambda messages: iter([threading.Event().wait(2), answered(messages[0])][1:]))
    with Client(server.target) as client:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            client.generate_batch(["a", "b"])

    assert sorted(server.cancelled_ids) == sorted(ids_of(server.batches[0]))


async def test_cancelling_the_task_cancels_a_batch(server: ScriptedServer):
    """As with the task that reads a stream."""
    server.batch_scripts.append(lambda messages: iter([threading.Event().wait(2), answered(messages[0])][1:]))
    async with AsyncClient(server.target) as client:
        task = asyncio.create_task(client.generate_batch(["a", "b"]))
        await asyncio.to_thread(wait_until_asked, server)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert sorted(server.cancelled_ids) == sorted(ids_of(server.batches[0]))


def test_closing_the_client_ends_a_batch_of_another_thread(server: ScriptedServer):
    """A service that shuts down does not wait for hours of work."""
    server.batch_scripts.append(lambda messages: iter([threading.Event().wait(2), answered(messages[0])][1:]))
    client = Client(server.target)
    errors: list[Exception] = []

    def run() -> None:
        try:
            client.generate_batch(["a", "b"])
        except Cancelled as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until_asked(server)
    client.close()
    thread.join(timeout=10)

    assert len(errors) == 1
    assert sorted(server.cancelled_ids) == sorted(ids_of(server.batches[0]))


def test_no_more_of_a_batch_is_cancelled_than_can_run():
    """Thousands of calls would be an attack; the server does not let in more than a thousand of a batch at once."""
    prompts = [f"{index}" for index in range(2_000)]
    batch = Batch(prompts, {"detach_timeout_s": 30}, Attempts(None, 0, 30), None, "raise")
    sent = [message.request.request_id for message in batch.messages()]

    assert batch.open_ids() == sent[:1024]


def test_a_batch_without_a_detach_time_out_sends_no_cancel(connect, server):
    """The end of its call is enough."""
    server.batch_scripts.append(lambda messages: [failed(messages[0], grpc.StatusCode.INTERNAL)])
    client = connect(detach_timeout_s=0)
    with pytest.raises(Exception, match="as scripted"):
        client.generate_batch(["a", "b"])
    client.close()

    with pytest.raises(Empty):
        server.cancels.get(timeout=0.05)
