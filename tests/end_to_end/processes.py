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

from common.grpc_servers import open_channel
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
        self.words = words
        self._output = output
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "client"))),
            "COLUMNS": "500",  # messages stay on one line
            "NO_COLOR": "1",
        }
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # what is compiled already starts a fifth faster
        with output.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, *words], stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=REPOSITORY
            )

    @property
    def printed(self):
        return self._output.read_text(errors="replace")

    @property
    def process_id(self):
        return self._process.pid

    @property
    def has_ended(self):
        return self._process.poll() is not None

    @property
    def descriptor_count(self):
        """Files and sockets that it has open."""
        return len(os.listdir(f"/proc/{self._process.pid}/fd"))

    @property
    def thread_count(self):
        return len(os.listdir(f"/proc/{self._process.pid}/task"))

    def kill(self):
        """Let it vanish without a word, and wait until it has."""
        self._process.kill()
        self._process.wait()

    def terminate(self):
        """Ask it to drain."""
        self._process.send_signal(signal.SIGTERM)

    def suspend(self):
        """Stop it where it is: its sockets stay open, and nobody answers on them."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self):
        """Let it go on, with everything that it believes."""
        self._process.send_signal(signal.SIGCONT)

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
        self.folder = folder
        self.processes = []  # all that were ever started
        self._channel = open_channel(self.address)  # finds a restarted scheduler at once
        self._fleet = fleet_pb2_grpc.FleetServiceStub(self._channel)

    def run(self, *words):
        """Start any command of Python's."""
        process = Process(self.folder / f"printed-{len(self.processes)}", *words)
        self.processes.append(process)
        return process

    def command(self, *words):
        """Start a `paceline` command."""
        return self.run("-m", "paceline_cli", *words)

    def again(self, process):
        """Start what has ended with the same words: under its name, at its address, with its journal."""
        assert process.has_ended
        return self.run(*process.words)

    async def scheduler(self, *words, model="fake", journal=False):
        """Start the scheduler and wait until it answers; its journal stays the same over restarts."""
        process = self.start_scheduler(*words, model=model, journal=journal)
        await process.has_printed("scheduler ready")
        return process

    def start_scheduler(self, *words, model="fake", journal=False):
        """Start the scheduler."""
        keeping = ("--journal", f"{self.folder}/journal") if journal else ()
        return self.command("scheduler", str(model), "--listen", self.address, *keeping, *words)

    async def restarted_scheduler(self, process):
        """Kill the scheduler, start it again with the same words and wait until it answers."""
        process.kill()
        process = self.again(process)
        await process.has_printed("scheduler ready")
        return process

    async def executor(self, name, *words, **places):
        """Start an executor and wait until the scheduler can plan for it."""
        process = self.start_executor(name, *words, **places)
        await self.is_ready(name, process)
        return process

    def start_executor(self, name, *words, model="fake", join_through=None, attach_through=None):
        """Start an executor. It reaches the scheduler, and the scheduler reaches it, through proxies where given."""
        through = ("--advertise", attach_through.address) if attach_through else ()
        scheduler = join_through.address if join_through else self.address
        listen = ("--listen", self.address_of(name))
        return self.command(
            "executor", str(model), "--scheduler", scheduler, *listen, "--executor-id", name, *through, *words
        )

    def address_of(self, name):
        """Where an executor listens."""
        return f"unix:{self.folder}/{name}"

    async def is_ready(self, name, process):
        """Wait until the scheduler can plan for an executor that has been started."""

        async def look():
            assert not process.has_ended, process.printed
            return await self.state_of(name) == fleet_pb2.EXECUTOR_STATE_READY

        await until(look, f"executor {name} did not join")

    async def fleet(self):
        """What `FleetService.ListExecutors` says, of the scheduler that is there or of the next."""
        while True:
            try:
                return await self._fleet.ListExecutors(
                    fleet_pb2.ListExecutorsRequest(), wait_for_ready=True, timeout=PATIENCE_S
                )
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise

    async def drain(self, name, finish_within_s=0):
        """Ask the scheduler to take an executor out of service."""
        await self._fleet.Drain(fleet_pb2.DrainRequest(executor_id=name, finish_within_s=finish_within_s))

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
        for process in self.processes:
            process.kill()

    async def close(self):
        await self._channel.close()
