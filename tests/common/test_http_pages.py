"""How the HTTP port holds out against those who do not read, or do not even ask."""

import http.client
import socket
import time

import pytest

from common.http_pages import HttpPages, Page
from common.processes import ANY_PORT


@pytest.fixture
def serve():
    """Starts servers of one page; called with their limits, it returns the port."""
    started = []

    def start(**limits):
        pages = HttpPages([], {"/": lambda _: Page("home", "text/plain")}, **limits)
        started.append(pages)
        return pages.start(ANY_PORT, "127.0.0.1")

    yield start
    for pages in started:
        pages.stop()


def get(port):
    """Status and text of the page."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", "/")
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def served(port):
    """What is answered once a thread has given itself back, which takes a moment after the end of its connection."""
    deadline = time.monotonic() + 60
    while (answer := get(port))[0] == 503 and time.monotonic() < deadline:
        time.sleep(0.01)
    return answer


def connect(port):
    """A connection over which nothing has been said."""
    return socket.create_connection(("127.0.0.1", port), timeout=60)


def test_one_connection_too_many_is_told_so_at_once_and_the_next_one_is_served(serve):
    """A monitor gone wild must not take the threads and the memory of the process that it monitors."""
    port = serve(most_connections=2, within_s=600)
    silent = [connect(port), connect(port)]
    refused = get(port)
    for one in silent:
        one.close()

    assert refused[0] == 503
    assert "too many connections" in refused[1]
    assert served(port) == (200, "home")


def test_whoever_asks_for_nothing_is_not_waited_for(serve):
    """Browsers open connections in case they need one: each would hold a thread."""
    port = serve(most_connections=1, within_s=0.1)
    with connect(port) as silent:
        assert silent.recv(1) == b""

    assert served(port) == (200, "home")


def test_a_letter_now_and_then_does_not_keep_a_connection(serve):
    """The time is for the whole request: else a few slow peers would have all of the threads for ever."""
    port = serve(within_s=0.3)
    with connect(port) as slow:
        slow.settimeout(0.02)
        is_open, deadline = True, time.monotonic() + 60
        while is_open and time.monotonic() < deadline:
            try:
                slow.send(b"x")
                is_open = slow.recv(1) != b""
            except TimeoutError:
                pass
            except ConnectionError:
                is_open = False

    assert not is_open
    assert get(port) == (200, "home")
