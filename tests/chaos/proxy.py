"""A proxy between two processes that does to their bytes what networks do: it loses, delays and cuts them.

It knows nothing of what it carries. Faults hold for all connections through it, those that are open and those that
come, in the ways that are named or in both, until `heal`. Nothing is random here: chance is the caller's.
"""

import asyncio
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum

_CHUNK_BYTES = 65536
_RESET = None  # in the place of bytes: the connection broke


class WhenAway(Enum):
    """What happens to a new connection while nobody listens at the target."""

    RESET = "reset"
    CLOSE = "close"  # as port forwarders do: they find out after they took it
    HANG = "hang"  # nothing, as where a firewall swallows what comes


class Way(Enum):
    """A direction of a connection."""

    THERE = "there"  # from whoever dials to the one that is dialled
    BACK = "back"


@dataclass(slots=True)
class _Fault:
    """What happens to bytes that go one way."""

    drops: bool = False
    delay_s: float = 0.0
    bytes_until_cut: int | None = None  # None: no cut is due


@dataclass(eq=False, slots=True)
class _Connection:
    """Two sockets that are one connection for those at its ends."""

    writers: tuple[asyncio.StreamWriter, asyncio.StreamWriter]
    is_forgotten: bool = False  # dead, and nobody is told
    has_lost: bool = False  # bytes, or the end: what would follow makes no sense to who missed them
    broken: asyncio.Event = field(default_factory=asyncio.Event)

    def reset(self):
        """End it without a word at both ends, with RST where the sockets know one."""
        self.broken.set()
        for writer in self.writers:
            _reset(writer)


class Proxy:
    """Listens on one address and carries every connection to another, as far as its faults let it."""

    def __init__(self, target, address="127.0.0.1:0", when_away=WhenAway.RESET):
        self.target = target  # where new connections are carried to; may be changed at any time
        self.address = address  # where it listens; has its real port once it is started
        self.vain_count = 0  # connections that were taken while nobody listened at the target
        self._when_away = when_away
        self._faults = {way: _Fault() for way in Way}
        self._connections = set()
        self._tasks = set()  # one for each connection, from before it is one
        self._refuses = False

    async def start(self):
        """Listen."""
        if self.address.startswith("unix:"):
            path = self.address.removeprefix("unix:")
            self._server = await asyncio.start_unix_server(self._accept, path)
        else:
            host, _, port = self.address.rpartition(":")
            self._server = await asyncio.start_server(self._accept, host, int(port))
            self.address = f"{host}:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def close(self):
        """Listen no more, and end every connection."""
        self._server.close()
        self.heal()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def __aenter__(self):
        return await self.start()

    async def __aexit__(self, *_):
        await self.close()

    @property
    def connection_count(self):
        """Connections that are open through it."""
        return len(self._connections)

    def drop(self, *ways):
        """Swallow what comes from now on: nothing arrives any more, not even the end, and nobody is told."""
        for way in ways or Way:
            self._faults[way].drops = True

    def forget(self):
        """Let the connections that are open go dead, as a router does that starts anew. New ones are welcome."""
        for connection in self._connections:
            connection.is_forgotten = True

    def delay(self, seconds, *ways):
        """Let everything that comes from now on arrive that much later, in order."""
        for way in ways or Way:
            self._faults[way].delay_s = seconds

    def cut(self):
        """Break all connections. New ones are welcome."""
        for connection in self._connections:
            connection.reset()

    def cut_after(self, byte_count, way):
        """Break all connections once that many more bytes went this way, so that the cut falls inside a message."""
        self._faults[way].bytes_until_cut = byte_count

    def refuse(self):
        """Break new connections at once, as if nobody listened. Open ones live on."""
        self._refuses = True

    def heal(self):
        """Be a good network again.

        Connections that lost something are broken, for nothing sensible can follow on them: so does the first machine
        on a mended way that has forgotten them.
        """
        self._refuses = False
        self._faults.update({way: _Fault() for way in Way})
        for connection in self._connections:
            if connection.has_lost:
                connection.reset()

    def _accept(self, reader, writer):
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, near_reader, near_writer):
        """Carry one connection until both of its directions have ended."""
        try:
            if self._refuses:
                raise ConnectionRefusedError
            far_reader, far_writer = await _dial(self.target)
        except asyncio.CancelledError:
            _reset(near_writer)
            return
        except OSError:
            await self._disappoint(near_reader, near_writer)
            return
        connection = _Connection((near_writer, far_writer))
        self._connections.add(connection)
        try:
            await asyncio.gather(
                self._carry(connection, Way.THERE, near_reader, far_writer),
                self._carry(connection, Way.BACK, far_reader, near_writer),
            )
        finally:
            self._connections.discard(connection)
            connection.reset()

    async def _disappoint(self, reader, writer):
        """There is nobody to carry a connection to."""
        self.vain_count += 1
        if self._refuses or self._when_away is WhenAway.RESET:
            _reset(writer)
            return
        if self._when_away is WhenAway.HANG:
            with suppress(OSError, asyncio.CancelledError):  # broken from there; or this proxy ends
                while await reader.read(_CHUNK_BYTES):
                    pass
        writer.close()

    async def _carry(self, connection, way, reader, writer):
        """Carry the bytes of one direction to their end."""
        held = asyncio.Queue()  # what has come, and when it may go on
        receiving = asyncio.create_task(self._receive(way, reader, held))
        try:
            while True:
                due_at, data = await held.get()
                await asyncio.sleep(max(0.0, due_at - asyncio.get_running_loop().time()))
                await self._deliver(connection, way, data, writer)
                if not data:
                    break
            if connection.has_lost:
                await connection.broken.wait()  # half-open: it does not end by itself
        finally:
            receiving.cancel()

    async def _receive(self, way, reader, held):
        """Put what comes in line; the end of the stream is empty bytes."""
        while True:
            try:
                data = await reader.read(_CHUNK_BYTES)
            except OSError:
                data = _RESET
            held.put_nowait((asyncio.get_running_loop().time() + self._faults[way].delay_s, data))
            if not data:
                break

    async def _deliver(self, connection, way, data, writer):
        """Hand on what is due now, or lose it."""
        fault = self._faults[way]
        if fault.drops or connection.is_forgotten:
            connection.has_lost = True
        elif data is _RESET:
            connection.reset()
        elif fault.bytes_until_cut is not None and len(data) >= fault.bytes_until_cut:
            data, fault.bytes_until_cut = data[: fault.bytes_until_cut], None
            await _write(writer, data)
            self.cut()
        elif data:
            if fault.bytes_until_cut is not None:
                fault.bytes_until_cut -= len(data)
            await _write(writer, data)
        else:
            with suppress(OSError):  # the other end is gone
                writer.write_eof()


async def _dial(address):
    if address.startswith("unix:"):
        return await asyncio.open_unix_connection(address.removeprefix("unix:"))
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def _write(writer, data):
    """Write all of it. That the other end is gone is no news to its own direction, which ends everything."""
    if not writer.is_closing():
        writer.write(data)
    while not writer.is_closing() and writer.transport.get_write_buffer_size():
        await asyncio.sleep(0.001)


def _reset(writer):
    """Close a socket so that the other end sees RST. A unix socket has none and just ends."""
    end = writer.get_extra_info("socket")
    if end is not None and end.family != socket.AF_UNIX and not writer.is_closing():
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
