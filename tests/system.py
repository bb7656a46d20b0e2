"""A whole system on one event loop: scheduler and executors with real servers and streams, without processes."""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import grpc

from executor_svc.config import ExecutorConfig
from executor_svc.fake import FakeRunner
from executor_svc.main import ExecutorApp
from paceline.v1 import fleet_pb2_grpc, inference_pb2, inference_pb2_grpc, sampling_pb2
from scheduler_svc.config import SchedulerConfig
from scheduler_svc.main import SchedulerApp, load_model

PLACING = ("choice_count", "priority", "tenant", "cache_salt", "detach_timeout_s")
FAST = ExecutorConfig(model="fake", block_size=4, fake_block_count=64, max_num_seqs=8, fake_step_us=500)


class System:
    """A scheduler that listens, and stubs to talk to it."""

    def __init__(self, app, address, channel, stopping):
        self.app = app
        self.stopping = stopping  # set it to stop the scheduler
        self.address = address
        self.inference = inference_pb2_grpc.InferenceServiceStub(channel)
        self.fleet = fleet_pb2_grpc.FleetServiceStub(channel)
        self.tasks = set()

    @property
    def scheduler(self):
        return self.app.engine.scheduler

    def add_executor(self, config=FAST, runner=None, name="e"):
        """Start an executor that joins; returns the task that runs it. Cancelling the task is a kill."""
        config = replace(config, scheduler=self.address, executor_id=name, drain_timeout_s=1)
        task = asyncio.create_task(run_executor(config, runner or FakeRunner(config)), name=name)
        self.tasks.add(task)
        return task

    def generate(self, message, timeout=None):
        """Start a request."""
        return Call(self.inference.Generate(message, timeout=timeout))

    async def ready(self, executor_count=1):
        await until(lambda: len(self.scheduler.executors) == executor_count)

    async def idle(self):
        """Wait until nothing runs any more, then hold every count against what it counts."""
        await until(lambda: not self.scheduler.request_count)
        self.scheduler.check_invariants()
        for executor in self.scheduler.executors.values():
            assert executor.cache.pool.free_count == executor.capacity.block_count
            assert executor.slots.free_count == executor.capacity.slot_count


class Call:
    """A running `Generate`, to be read message by message."""

    def __init__(self, call):
        self.cancel = call.cancel
        self._messages = aiter(call)

    async def read(self):
        return await anext(self._messages)

    def __aiter__(self):
        return self._messages


async def run_executor(config, runner, stopping=None):
    app = ExecutorApp(config, runner)
    await app.start()
    await app.run(stopping or asyncio.Event())


async def until(condition, timeout_s=20.0):
    """Wait for something that is about to happen."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def started(executor_count=1, executor=FAST, model="fake", **settings):
    """A running system; `model` is `fake` or a serving folder, whose executors are added with runners."""
    settings = {"listen": ("127.0.0.1:0",), "drain_timeout_s": 1} | settings
    config = SchedulerConfig(model=str(model), **settings)
    app = SchedulerApp(config, *load_model(config))
    (address,) = await app.start()
    stopping = asyncio.Event()
    running = asyncio.create_task(app.run(stopping))
    async with AsyncExitStack() as stack:
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
        system = System(app, address, channel, stopping)
        system.running = running
        try:
            for number in range(executor_count):
                system.add_executor(executor, name=f"e{number}")
            await system.ready(executor_count)
            yield system
        finally:
            for task in system.tasks:
                task.cancel()
            await asyncio.gather(*system.tasks, return_exceptions=True)
            stopping.set()
            await running


def request(text="hello", max_output_tokens=8, *, request_id="", model="", **fields):
    """A request message; further fields go to it, its sampling parameters or its stop conditions, by name."""
    placing = {name: fields.pop(name) for name in PLACING if name in fields}
    stopping_names = set(sampling_pb2.StopConditions.DESCRIPTOR.fields_by_name)
    stopping = {name: fields.pop(name) for name in list(fields) if name in stopping_names}
    sampling_names = set(sampling_pb2.SamplingParams.DESCRIPTOR.fields_by_name)
    sampling = {name: fields.pop(name) for name in list(fields) if name in sampling_names}
    prompt = fields or {"text": text}
    return inference_pb2.GenerateRequest(
        request_id=request_id,
        model=model,
        sampling=sampling_pb2.SamplingParams(**sampling),
        stopping=sampling_pb2.StopConditions(max_output_tokens=max_output_tokens, **stopping),
        **prompt,
        **placing,
    )
