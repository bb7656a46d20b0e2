"""A whole house of processes that can be killed, suspended and started again by name, with a proxy on every line."""

import asyncio
import re
from contextlib import AsyncExitStack

from paceline import AsyncClient
from paceline.v1 import fleet_pb2
from tests.chaos.crowd import Crowd, of_every_kind
from tests.chaos.proxy import Proxy
from tests.end_to_end.processes import until

SCHEDULER = "scheduler"

# What gRPC itself prints for a call that runs when its server ends. Nobody of ours can catch it.
_CANCELLED_CALL = re.compile(
    r'Traceback \(most recent call last\):\n  File "src/python/grpcio/.*\nasyncio\.exceptions\.CancelledError'
)


_GARBAGE_COUNT = 3
"""Sockets of connections that are over, in objects that Python's garbage collector has not come to yet."""


class House:
    """A scheduler with a journal and executors, by name; and a client that is told of nothing.

    The three lines of the system can have proxies: `client_line`, and for each executor one in `join_lines`, on which
    it calls the scheduler, and one in `attach_lines`, on which the scheduler calls it.
    """

    def __init__(self, services, dice):
        self.services = services
        self.dice = dice
        self.processes = {}
        self.client_line = None
        self.join_lines = {}
        self.attach_lines = {}
        self._stack = AsyncExitStack()

    async def start(self, executors=("e0", "e1"), *, proxied=False, scheduler=(), executor=(), model="fake"):
        """Start everything and wait until it is ready; `scheduler` and `executor` are further words for each."""
        await self.start_scheduler(*scheduler, proxied=proxied, model=model)
        for name in executors:
            await self.start_executor(name, *executor, proxied=proxied, model=model)
        await self.is_ready()

    async def start_scheduler(self, *words, proxied=False, model="fake"):
        """Start the scheduler, without waiting for it."""
        self.processes[SCHEDULER] = self.services.start_scheduler(*words, model=model, journal=True)
        if proxied:
            self.client_line = await self._line(self.services.address)
        address = self.client_line.address if proxied else self.services.address
        self.client = await self.new_client(address)

    async def start_executor(self, name, *words, proxied=False, model="fake"):
        """Start an executor, without waiting for it."""
        if proxied:
            self.join_lines[name] = await self._line(self.services.address)
            self.attach_lines[name] = await self._line(self.services.address_of(name))
        self.processes[name] = self.services.start_executor(
            name,
            *words,
            model=model,
            join_through=self.join_lines.get(name),
            attach_through=self.attach_lines.get(name),
        )

    async def new_client(self, address=None):
        """A client that does not give up while something is being restarted."""
        address = address or (self.client_line or self.services).address
        return await self._stack.enter_async_context(AsyncClient(address, max_retries=1000))

    async def close(self):
        """Close what is not a process."""
        await self._stack.aclose()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await self.close()

    @property
    def executors(self):
        """Names of the executors."""
        return [name for name in self.processes if name != SCHEDULER]

    @property
    def lines(self):
        """All proxies."""
        return [*filter(None, [self.client_line]), *self.join_lines.values(), *self.attach_lines.values()]

    def kill(self, *names):
        """Let processes vanish at once."""
        for name in names:
            self.processes[name].kill()

    def start_again(self, *names):
        """Start what has ended as it was started before, without waiting for it."""
        for name in names:
            self.processes[name] = self.services.again(self.processes[name])

    async def restart(self, *names):
        """Start what has ended as it was started before, and wait until all of it is ready."""
        self.start_again(*names)
        await self.is_ready(*names)

    async def is_ready(self, *names):
        """Wait until these processes, or all, do their work."""
        names = names or tuple(self.processes)
        if SCHEDULER in names:
            await self.processes[SCHEDULER].has_printed("scheduler ready")
        for name in names:
            if name != SCHEDULER:
                await self.services.is_ready(name, self.processes[name])

    def crowd(self, asks):
        """Send requests, and begin to read their answers."""
        return Crowd(self.client, asks)

    async def has_work(self, *names):
        """Wait until each of these executors has requests, and steps behind it."""

        async def look():
            executors = await self.services.executors()
            return all(
                name in executors and executors[name].running_request_count and executors[name].step > 1
                for name in names
            )

        await until(look, f"not all of {names} have work")

    async def descriptor_counts(self):
        """Files and sockets that each process usually has open: once a request has been served everywhere."""
        await self.crowd(of_every_kind(self.dice, 5)).recomputation_counts()
        return self._descriptor_counts()

    async def assert_clean(self, usual=None):
        """Assert that nothing is left: no request, no block, no error in a log, no socket beyond the `usual` counts."""

        async def nothing_is_left():
            await self._raise_the_dead()
            return await self.services.is_idle() and await self._some_are_ready()

        async def nothing_grew():
            now = self._descriptor_counts()
            return not usual or all(now[name] <= count + _GARBAGE_COUNT for name, count in usual.items())

        await until(nothing_is_left, "something is left of requests that have ended")
        await until(nothing_grew, f"there are more open files and sockets than the usual {usual}")
        for process in self.services.processes:
            said = _CANCELLED_CALL.sub("", process.printed)
            assert "Traceback" not in said, f"{process.words}\n{said}"

    async def supervise(self, slowest_s=0.5):
        """Start again whatever ends, a moment later, until cancelled."""
        while True:
            await asyncio.sleep(0.1)
            ended = [name for name, process in self.processes.items() if process.has_ended]
            if ended:
                await asyncio.sleep(self.dice.uniform(0, slowest_s))
                self.start_again(*ended)

    def _descriptor_counts(self):
        return {name: process.descriptor_count for name, process in self.processes.items()}

    async def _raise_the_dead(self):
        """Start what ended by itself, because it was told to or because it drained."""
        for name, process in self.processes.items():
            if process.has_ended:
                self.start_again(name)

    async def _some_are_ready(self):
        executors = (await self.services.executors()).values()
        return any(executor.state == fleet_pb2.EXECUTOR_STATE_READY for executor in executors)

    async def _line(self, target):
        return await self._stack.enter_async_context(Proxy(target))
