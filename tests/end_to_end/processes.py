"""A scheduler and executors as real processes, started through the command line and talked to over sockets."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpc

from paceline.v1 import fleet_pb2, fleet_pb2_grpc

REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 60.0


async def until(condition, complaint):
    """Wait until `await condition()` gives something true, and return that."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := await condition()):
        assert time.monotonic() < deadline, complaint
        await asyncio.sleep(0.02)
    return value


class Process:
    """A running command and what it has printed."""

    def __init__(self, output, *words):
        self._output = output
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "client"))),
            "COLUMNS": "500",  # messages stay on one line
            "NO_COLOR": "1",
        }
        with output.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, *words], stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=REPOSITORY
            )

    @property
    def printed(self):
        return self._output.read_text(errors="replace")

    @property
    def has_ended(self):
        return self._process.poll() is not None

    def kill(self):
        """Let it vanish without a word, and wait until it has."""
        self._process.kill()
        self._process.wait()

    def terminate(self):
        """Ask it to drain."""
        self._process.send_signal(signal.SIGTERM)

    async def has_printed(self, pattern):
        """The match of `pattern`, once it is printed."""

        async def look():
            had_ended = self.has_ended
            match = re.search(pattern, self.printed)
            assert match or not had_ended, self.printed
            return match

        return await until(look, f"did not print {pattern!r}")

    async def exit_code(self):
        """How it ended, once it has."""

        async def look():
            return self.has_ended

        await until(look, "did not end")
        return self._process.returncode


class Services:
    """One scheduler, at the same sockets all the time, and any number of executors."""

    def __init__(self, folder):
        self.address = f"unix:{folder}/scheduler"
        self._folder = folder
        self._processes = []
        self._channel = grpc.aio.insecure_channel(self.address)
        self._fleet = fleet_pb2_grpc.FleetServiceStub(self._channel)

    def run(self, *words):
        """Start any command of Python's."""
        process = Process(self._folder / f"printed-{len(self._processes)}", *words)
        self._processes.append(process)
        return process

    def command(self, *words):
        """Start a `paceline` command."""
        return self.run("-m", "paceline_cli", *words)

    async def scheduler(self, *words, model="fake"):
        """Start the scheduler and wait until it answers."""
        process = self.command("scheduler", str(model), "--listen", self.address, *words)
        await process.has_printed("scheduler ready")
        return process

    async def executor(self, name, *words):
        """Start an executor and wait until the scheduler can plan for it."""
        listen = f"unix:{self._folder}/{name}"
        process = self.command(
            "executor", "fake", "--scheduler", self.address, "--listen", listen, "--executor-id", name, *words
        )

        async def is_ready():
            assert not process.has_ended, process.printed
            return await self.state_of(name) == fleet_pb2.EXECUTOR_STATE_READY

        await until(is_ready, f"executor {name} did not join")
        return process

    async def fleet(self):
        """What `FleetService.ListExecutors` says."""
        return await self._fleet.ListExecutors(fleet_pb2.ListExecutorsRequest(), wait_for_ready=True)

    async def executors(self):
        """The executors by name."""
        return {executor.executor_id: executor for executor in (await self.fleet()).executors}

    async def state_of(self, name):
        """State of an executor; None when it is not in the fleet."""
        executor = (await self.executors()).get(name)
        return executor and executor.state

    async def is_idle(self):
        """Whether nothing waits or runs, and every block of every executor is free."""
        fleet = await self.fleet()
        return not fleet.waiting_request_count and all(
            executor.running_request_count == 0 and executor.free_block_count == executor.capacity.block_count
            for executor in fleet.executors
        )

    def kill_all(self):
        for process in self._processes:
            process.kill()

    async def close(self):
        await self._channel.close()
