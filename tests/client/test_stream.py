"""Streaming one request: what the reader gets, and when the server learns that nobody reads."""

import asyncio
import gc
import os
import signal
import threading

import grpc
import pytest

from paceline import (
    AsyncClient,
    Cancelled,
    Choice,
    Chunk,
    Client,
    FinishReason,
    Output,
    ServerError,
    Unavailable,
    Usage,
)
from paceline.v1 import inference_pb2 as pb
from tests.client.scripted_server import ACCEPTED, HELLO, UNAVAILABLE, Fail, ScriptedServer, Wait, last, tokens

USAGE = Usage(5, 2, 10, 20, 30, 0, 4)


def test_gives_a_chunk_before_the_next_one_exists(client, server):
    """A stream is there to show text while the rest is still being computed."""
    rest = Wait()
    server.scripts.append((ACCEPTED, tokens("Hel", 7), rest, last("lo", 8)))

    stream = client.generate("Say hello")
    first = next(stream)
    text_so_far = stream.text
    rest.event.set()

    assert first == Chunk("Hel", (7,))
    assert text_so_far == "Hel"
    assert list(stream) == [Chunk("lo", (8,), FinishReason.LENGTH, USAGE)]


def test_has_the_whole_output_after_the_last_chunk(client, server):
    """Who shows chunks also wants the sum of them, with the reason and the usage."""
    stream = client.generate("Say hello", request_id="mine")
    for _ in stream:
        pass

    hello = Choice(0, "Hello", (7, 8), FinishReason.LENGTH)
    assert stream.output == Output("mine", "Hello", (7, 8), FinishReason.LENGTH, USAGE, (hello,))
    assert stream.text == "Hello"
    assert stream.texts == ("Hello",)


def test_has_no_output_before_the_last_chunk(client, server):
    """Half an answer must not pass for a whole one."""
    server.scripts.append((ACCEPTED, tokens("Hel", 7), Wait()))
    with client.generate("Say hello") as stream:
        next(stream)

        with pytest.raises(RuntimeError, match="before its last chunk"):
            _ = stream.output


def test_gives_the_output_alone_without_streaming(client, server):
    """Most scripts want the answer and nothing else."""
    output = client.generate("Say hello", stream=False)

    assert (output.text, output.token_ids, output.finish_reason) == ("Hello", (7, 8), "length")


def test_ends_with_stop_when_the_model_ended(client, server):
    """The two finish reasons must not be mixed up: one says the answer is whole, the other that it is cut."""
    server.scripts.append((ACCEPTED, last("Hello", 7, reason=pb.FINISH_REASON_STOP)))

    assert client.generate("Say hello", stream=False).finish_reason is FinishReason.STOP


def test_keeps_chunks_that_bring_tokens_without_text(client, server):
    """A token may be half a character; who counts tokens must see it come."""
    server.scripts.append((ACCEPTED, tokens("", 7), last("é", 8)))

    assert [chunk.token_ids for chunk in client.generate("Say é")] == [(7,), (8,)]


def test_leaving_the_with_early_cancels(client, server):
    """Nobody pays for tokens that nobody reads."""
    server.scripts.append((ACCEPTED, tokens("Hel", 7), Wait()))
    with client.generate("Say hello") as stream:
        next(stream)

    assert server.broken_off.get(timeout=10)


def test_dropping_the_stream_cancels(client, server):
    """A `break` out of a plain `for` leaves no request behind."""
    server.scripts.append((ACCEPTED, tokens("Hel", 7), Wait()))
    for _ in client.generate("Say hello"):
        break
    gc.collect()

    assert server.broken_off.get(timeout=10)


def test_reading_on_after_close_raises_cancelled(client, server):
    """A closed stream must not look like one that came to its end."""
    server.scripts.append((ACCEPTED, tokens("Hel", 7), Wait()))
    stream = client.generate("Say hello")
    next(stream)
    stream.close()

    with pytest.raises(Cancelled):
        next(stream)


def test_gives_every_chunk_that_came_before_an_error(client, server):
    """A slow reader is owed what had been delivered when the server failed."""
    server.scripts.append(
        (ACCEPTED, *[tokens(str(i), i) for i in range(9)], Fail(grpc.StatusCode.INTERNAL, "step failed"))
    )
    stream = client.generate("Count")
    first = next(stream)
    threading.Event().wait(0.2)  # the rest and the error are here by now
    chunks = [first]

    with pytest.raises(ServerError, match=r"step failed \(after 9 tokens\)"):
        chunks.extend(stream)
    assert stream.text == "012345678"


def test_ignores_a_connection_that_breaks_after_the_last_chunk(client, server):
    """Everything had come: there is nothing to complain about."""
    server.scripts.append((*HELLO, UNAVAILABLE))

    assert client.generate("Say hello", stream=False).text == "Hello"


def test_refuses_a_stream_without_a_finish_reason(client, server):
    """A proxy that ends a stream politely in the middle must not make an answer of its half."""
    server.scripts.append((ACCEPTED, tokens("Hel", 7)))

    with pytest.raises(ServerError, match="without a finish reason"):
        client.generate("Say hello", stream=False)


def test_closing_the_client_ends_its_streams_with_cancelled(connect, server):
    """Not with asyncio's CancelledError, which would look as if the reader's own task was cancelled."""
    server.scripts.append((ACCEPTED, tokens("Hel", 7), Wait()))
    client = connect()
    stream = client.generate("Say hello")
    next(stream)
    client.close()

    with pytest.raises(Cancelled):
        next(stream)


def test_close_wakes_a_thread_that_waits_for_a_retry(server: ScriptedServer):
    """Ctrl-C handlers and user interfaces close streams from other threads."""
    server.scripts.append((Fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after_s=60),))
    with Client(server.target) as client:
        stream = client.generate("Say hello")
        threading.Timer(0.2, stream.close).start()

        with pytest.raises(Cancelled):
            next(stream)
    assert len(server.requests) == 1


def test_ctrl_c_interrupts_a_waiting_reader_and_cancels(server: ScriptedServer):
    """The first thing a user tries when an answer takes too long."""
    server.scripts.append((ACCEPTED, Wait()))
    with Client(server.target) as client:
        stream = client.generate("Say hello")
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()

        with pytest.raises(KeyboardInterrupt):
            next(stream)
        assert server.broken_off.get(timeout=10)


def test_leaves_no_thread_behind(server: ScriptedServer):
    """A program that makes many clients must not grow."""
    before = set(threading.enumerate())
    with Client(server.target) as client:
        client.generate("Say hello", stream=False)
        client.generate_batch(["a", "b"])
        server.scripts.append((ACCEPTED, tokens("Hel", 7), Wait()))
        with client.generate("Say hello") as stream:
            next(stream)
    new = [thread for thread in set(threading.enumerate()) - before if "ThreadPoolExecutor" not in thread.name]
    for thread in new:
        thread.join(timeout=10)

    assert not [thread for thread in new if thread.is_alive()]


async def test_cancelling_the_reading_task_cancels_the_request(server: ScriptedServer):
    """Web frameworks cancel the task of a user who went away; asyncio must see its own CancelledError."""
    server.scripts.append((ACCEPTED, Wait()))
    async with AsyncClient(server.target) as client:
        task = asyncio.create_task(client.generate("Say hello", stream=False))
        await asyncio.sleep(0.2)
        task.cancel()

        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.broken_off.get, timeout=10)


async def test_many_tasks_share_one_async_client(server: ScriptedServer):
    """The answers of requests that run at the same time must not mix."""
    for text in "abcdefgh":
        server.scripts.append((ACCEPTED, last(text, ord(text))))
    async with AsyncClient(server.target) as client:
        outputs = await asyncio.gather(*[client.generate("Say", stream=False) for _ in range(8)])

    assert sorted(output.text for output in outputs) == list("abcdefgh")
    assert all(output.token_ids == (ord(output.text),) for output in outputs)


def test_an_unreachable_server_is_unavailable(connect, server):
    """The most common mistake of all: the server is not running."""
    server.stop()

    with pytest.raises(Unavailable) as caught:
        connect(max_retries=1).generate("Say hello", stream=False)
    assert caught.value.request_id.startswith("req-")
