"""The proxy does what it says: a fault that does not happen would let every test behind it pass."""

import asyncio
import random
import time
from contextlib import asynccontextmanager

import grpc
import pytest

from tests.chaos.proxy import Proxy, Way

PATIENCE_S = 10


@pytest.fixture(params=["tcp", "unix"])
async def proxy(request, tmp_path):
    """A proxy before a server that sends everything back, over either kind of socket."""
    listen = {"tcp": ("127.0.0.1:0", "127.0.0.1:0"), "unix": (f"unix:{tmp_path}/echo", f"unix:{tmp_path}/proxy")}
    target, address = listen[request.param]
    async with echoing(target) as target, Proxy(target, address) as proxy:
        yield proxy


@asynccontextmanager
async def echoing(address):
    """A server that sends back what it gets, and ends when its peer does; gives its address."""

    async def echo(reader, writer):
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        writer.transport.abort()

    if address.startswith("unix:"):
        server = await asyncio.start_unix_server(echo, address.removeprefix("unix:"))
    else:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield address


@asynccontextmanager
async def connected(proxy):
    """A connection through the proxy."""
    if proxy.address.startswith("unix:"):
        reader, writer = await asyncio.open_unix_connection(proxy.address.removeprefix("unix:"))
    else:
        host, _, port = proxy.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield reader, writer
    finally:
        writer.transport.abort()


async def rest_of(reader):
    """Everything up to the end, be it an end or a reset."""
    data = b""
    try:
        while piece := await reader.read(65536):
            data += piece
    except OSError:
        pass
    return data


async def assert_silent(reader):
    """Nothing comes, not even the end."""
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), 0.1)


async def test_carries_every_byte_and_the_end_of_each_direction(proxy):
    """What it does without a fault must not be what a test finds."""
    sent = random.Random(1).randbytes(5_000_000)
    async with connected(proxy) as (reader, writer):
        receiving = asyncio.create_task(rest_of(reader))
        writer.write(sent)
        writer.write_eof()

        assert await receiving == sent
        while proxy.connection_count:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("way", [*Way, None], ids=["there", "back", "both"])
async def test_a_dropped_direction_is_silent_and_stays_open(proxy, way):
    """Half-open is the failure that no error announces: only silence does."""
    async with connected(proxy) as (reader, writer):
        proxy.drop(*[way] if way else [])
        writer.write(b"lost")
        writer.write_eof()
        await assert_silent(reader)

        assert proxy.connection_count == 1
        proxy.heal()
        assert await rest_of(reader) == b"", "what was swallowed came after all"


async def test_healing_breaks_only_connections_that_lost_something(proxy):
    """A stream with a hole in it is no network's doing, and would look like a bug of who reads it."""
    async with connected(proxy) as (reader, writer), connected(proxy) as (other_reader, other_writer):
        other_writer.write(b"before")
        assert await other_reader.read(6) == b"before"
        proxy.drop(Way.THERE)
        writer.write(b"lost")
        await assert_silent(reader)
        proxy.heal()
        other_writer.write(b"after")

        assert await other_reader.read(5) == b"after"
        assert await rest_of(reader) == b""


async def test_a_forgotten_connection_is_dead_while_new_ones_live(proxy):
    """The other half-open: nothing is wrong with the line, only with what was on it."""
    async with connected(proxy) as (reader, writer):
        writer.write(b"before")
        assert await reader.read(6) == b"before"
        proxy.forget()
        writer.write(b"lost")
        await assert_silent(reader)
        async with connected(proxy) as (other_reader, other_writer):
            other_writer.write(b"new")
            assert await other_reader.read(3) == b"new"
        await assert_silent(reader)


async def test_a_delay_holds_back_each_piece_and_keeps_their_order(proxy):
    """Latency is not bandwidth: a second piece does not wait for the delay of the first."""
    proxy.delay(0.2, Way.BACK)
    async with connected(proxy) as (reader, writer):
        begun = time.monotonic()
        for number in range(20):
            writer.write(bytes([number]))
            await asyncio.sleep(0.02)
        received = await reader.readexactly(20)
        took = time.monotonic() - begun

    assert received == bytes(range(20))
    assert 0.58 < took < 3, "20 delays one after the other take 4 s"


async def test_a_cut_breaks_what_is_open_and_lets_new_connections_in(proxy):
    """A broken line is dialled again at once; what was on it is gone."""
    async with connected(proxy) as (reader, writer):
        writer.write(b"before")
        assert await reader.read(6) == b"before"
        proxy.cut()
        if not proxy.address.startswith("unix:"):
            with pytest.raises(ConnectionResetError):
                await reader.read(1)
        assert await rest_of(reader) == b""
    async with connected(proxy) as (reader, writer):
        writer.write(b"again")

        assert await reader.read(5) == b"again"


@pytest.mark.parametrize("way", Way, ids=lambda way: way.value)
async def test_a_cut_after_some_bytes_lets_exactly_those_through(proxy, way):
    """The worst place to break is inside a message, and inside is a matter of one byte."""
    async with connected(proxy) as (reader, writer):
        writer.write(b"0123")
        assert await reader.readexactly(4) == b"0123"
        proxy.cut_after(10, way)
        writer.write(b"abc")
        assert await reader.readexactly(3) == b"abc"
        writer.write(b"defghijklmnop")
        rest = await rest_of(reader)

    assert b"defghij".startswith(rest)
    if way is Way.BACK:  # what had gone there need not have come back
        assert rest == b"defghij"
    async with connected(proxy) as (reader, writer):
        writer.write(b"x" * 100)
        assert await reader.readexactly(100) == b"x" * 100, "it cut twice"


async def test_refuses_new_connections_and_leaves_open_ones_alone(proxy):
    """A listener that is gone takes nobody's connection away."""
    async with connected(proxy) as (reader, writer):
        writer.write(b"1")
        assert await reader.read(1) == b"1"
        proxy.refuse()
        async with connected(proxy) as (refused, _):
            assert await rest_of(refused) == b""
        writer.write(b"2")
        assert await reader.read(1) == b"2"
    proxy.heal()
    async with connected(proxy) as (reader, writer):
        writer.write(b"3")

        assert await reader.read(1) == b"3"


async def test_a_target_that_is_not_there_looks_like_one_that_refuses(tmp_path):
    """Processes that are being restarted are dialled all the time."""
    async with Proxy(f"unix:{tmp_path}/nobody") as proxy:
        async with connected(proxy) as (reader, _):
            assert await rest_of(reader) == b""
        async with echoing("127.0.0.1:0") as proxy.target, connected(proxy) as (reader, writer):
            writer.write(b"now")

            assert await reader.read(3) == b"now"


async def repeat(request, context):
    """Send what came, numbered, until the caller has gone."""
    for number in range(100_000):
        yield request + b"%d" % number
        await asyncio.sleep(0.002)


@asynccontextmanager
async def repeating():
    """A gRPC server whose only method streams; gives its address."""
    server = grpc.aio.server()
    handler = grpc.unary_stream_rpc_method_handler(repeat)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Test", {"Repeat": handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def read_on(call, number):
    """Read messages from `number` on, each in its turn, until the call fails; returns its status code."""
    try:
        while message := await call.read():
            assert message == b"n%d" % number
            number += 1
    except grpc.aio.AioRpcError as error:
        return error.code()


async def test_a_grpc_stream_meets_the_faults_as_those_of_a_network():
    """Streams are what the proxy is made for: whole messages in order, then `UNAVAILABLE` or silence, then another."""
    async with repeating() as target, Proxy(target) as proxy:
        options = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.min_reconnect_backoff_ms", 100)]
        async with grpc.aio.insecure_channel(proxy.address, options=options) as channel:
            method = channel.unary_stream("/test.Test/Repeat")
            for fault in (proxy.cut, lambda: proxy.cut_after(29, Way.BACK)):
                call = method(b"n", wait_for_ready=True)
                assert [await call.read() for _ in range(20)] == [b"n%d" % number for number in range(20)]
                fault()
                assert await read_on(call, 20) is grpc.StatusCode.UNAVAILABLE
                while channel.get_state() is grpc.ChannelConnectivity.READY:  # the next call would meet the same fault
                    await asyncio.sleep(0.001)
            call = method(b"n", timeout=1, wait_for_ready=True)
            await call.read()
            proxy.drop(Way.BACK)

            assert await read_on(call, 1) is grpc.StatusCode.DEADLINE_EXCEEDED
