"""Metrics have as many series as there are executors and kinds, and not as users have ideas."""

import asyncio
import urllib.error
import urllib.request
from dataclasses import replace

import grpc
import pytest

from common.processes import ANY_PORT
from tests.system import FAST, request, started

NAMES = 30


def get(address, path, method="GET"):
    """Text of a page; "" where it is refused."""
    asked = urllib.request.Request(f"http://{address}{path}", method=method)
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError:
        return ""


def series(text):
    """Names and labels of what a page has."""
    return {line.rsplit(" ", 1)[0] for line in text.splitlines() if line and not line.startswith("#")}


async def ask(system, **fields):
    """A request, to its end."""
    async for _ in system.generate(request("hello", 2, **fields)):
        pass


async def ask_in_vain(system, status, **fields):
    """A request that is refused."""
    with pytest.raises(grpc.aio.AioRpcError, match=status):
        await ask(system, **fields)


async def ask_for_everything(system, address, channel, name):
    """All that a user can name, once."""
    await ask(system, request_id=f"id-{name}", tenant=f"tenant-{name}", cache_salt=f"salt-{name}", priority=1)
    await ask(system, stop=[f"stop-{name}"], temperature=0.5)
    await ask_in_vain(system, "NOT_FOUND", model=f"model-{name}")
    await ask_in_vain(system, "INVALID_ARGUMENT", request_id=f"no id {name}")
    await ask_in_vain(system, "INVALID_ARGUMENT", tenant=f"no tenant {name}")
    for method in (f"/paceline.v1.InferenceService/Method{name}", f"/service.{name}/Generate"):
        with pytest.raises(grpc.aio.AioRpcError, match="UNIMPLEMENTED"):
            await channel.unary_unary(method)(b"")
    with pytest.raises(grpc.aio.AioRpcError, match="INVALID_ARGUMENT"):
        await channel.unary_unary("/paceline.v1.InferenceService/Cancel")(b"\xff" + name.encode())
    with pytest.raises(grpc.aio.AioRpcError):
        await channel.unary_unary("/paceline.v1.ObservationService/GetTrace")(b"\x0a\x02no")
    for path, method in ((f"/{name}", "GET"), (f"/api/trace/{name}", "GET"), (f"/?{name}={name}", f"M{name}")):
        await asyncio.to_thread(get, address, path, method)


async def test_what_users_name_makes_no_series():
    """Each series costs Prometheus memory for hours: a thousand tenants with a thousand ids would end it."""
    async with (
        started(2, executor=replace(FAST, metrics_port=ANY_PORT)) as system,
        grpc.aio.insecure_channel(system.address) as channel,
    ):
        pages = system.app.pages()
        address = f"127.0.0.1:{pages.start(ANY_PORT, '127.0.0.1')}"
        executors = [member.joined.metrics_address for member in system.app.fleet.members.values()]
        there = [(address, "/metrics"), (address, "/metrics/vllm"), *((one, "/metrics") for one in executors)]

        async def look():
            return [series(await asyncio.to_thread(get, *where)) for where in there]

        await ask_for_everything(system, address, channel, "first")
        before = await look()
        for number in range(NAMES):
            await ask_for_everything(system, address, channel, f"x{number}")
        after = await look()
        pages.stop()

    assert all(len(found) > 10 for found in before)
    assert after == before
    assert not [one for found in after for one in found if "x1" in one]


async def test_executors_that_have_gone_take_their_series_with_them():
    """Autoscaled ones have a new name each: a day of them would be thousands of dead curves."""
    async with started(1) as system:
        pages = system.app.pages()
        address = f"127.0.0.1:{pages.start(ANY_PORT, '127.0.0.1')}"
        before = series(await asyncio.to_thread(get, address, "/metrics"))
        for number in range(3):
            task = system.add_executor(name=f"passing-{number}")
            await system.ready(2)
            during = series(await asyncio.to_thread(get, address, "/metrics"))
            task.cancel()
            async with asyncio.timeout(60):
                while len(system.app.fleet.members) > 1 or len(system.scheduler.executors) > 1:
                    await asyncio.sleep(0.01)
        after = series(await asyncio.to_thread(get, address, "/metrics"))
        pages.stop()

    assert any("passing-2" in one for one in during)
    assert after == before
