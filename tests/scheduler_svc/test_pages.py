"""What the scheduler answers over HTTP, and what that costs its event loop."""

import asyncio
import json
import threading
import urllib.error
import urllib.request

import pytest

from common.processes import ANY_PORT
from scheduler_svc.observation import pages as module
from tests.system import request, started


def get(port, path):
    """Status and text of a page."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture
async def system():
    """A service whose last requests were `r0`, `r1` and `r2`, and the port of its pages."""
    async with started() as system:
        for name in ("r0", "r1", "r2"):
            async for _ in system.generate(request("hello", 2, request_id=name)):
                pass
        pages = system.app.pages()
        system.port = pages.start(ANY_PORT, "127.0.0.1")
        yield system
        pages.stop()


async def test_overviews_with_other_numbers_of_requests_are_cut_from_one(system, monkeypatch):
    """Whoever counts through all of the numbers must not make the event loop look a thousand times."""
    monkeypatch.setattr(module, "_FRESH_S", 1e9)
    looks = []
    make = system.app._overview.make
    monkeypatch.setattr(system.app._overview, "make", lambda limit: looks.append(limit) or make(limit))
    texts = [
        await asyncio.to_thread(get, system.port, f"/api/overview?requests={n}") for n in (2, 0, 3, 100, 1, 101, 7)
    ]

    shown = [[one["requestId"] for one in json.loads(text)["requests"]] for _, text in texts]
    every = ["r2", "r1", "r0"]
    assert shown == [every[:2], [], every, every, every[:1], every, every]
    assert looks == [100, 1000]


async def test_an_overview_is_made_once_for_everybody_who_asks_at_the_same_time(system, monkeypatch):
    """`paceline top` and the page may be open many times; a request is described once, for whoever shows most."""
    overview = system.app._overview
    described = []
    describe = overview._request
    monkeypatch.setattr(overview, "_request", lambda one, now: described.append(one) or describe(one, now))
    now = overview._clock()
    monkeypatch.setattr(overview, "_clock", lambda: now)
    overview._made = None
    few, none, all_of_them, again = (overview.make(limit) for limit in (1, 0, 50, 1))

    assert [len(one.requests) for one in (few, none, all_of_them, again)] == [1, 0, 3, 1]
    assert [one.request_id for one in described] == ["r2", "r1", "r0"]
    assert few == again


async def test_who_asks_a_busy_scheduler_is_told_that_it_is_busy(system, monkeypatch):
    """Steps go before looks: the answer is 503 after a while, nobody hangs, and numbers for Prometheus still come."""
    monkeypatch.setattr(module, "_BUSY_S", 0.05)
    answers = {}

    def ask():
        for path in ("/api/overview", "/sd", "/metrics"):
            answers[path] = get(system.port, path)

    asking = [threading.Thread(target=ask) for _ in range(3)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()  # which keeps the event loop from everything else
    monkeypatch.undo()

    assert [answers[path][0] for path in ("/api/overview", "/sd", "/metrics")] == [503, 503, 200]
    assert "too busy" in answers["/api/overview"][1]
    assert (await asyncio.to_thread(get, system.port, "/api/overview"))[0] == 200
