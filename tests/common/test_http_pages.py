"""How the HTTP port holds out against those who do not read, or do not even ask."""

import http.client
import socket
import time

import pytest
from structlog.testing import capture_logs

from common.http_pages import HttpPages, Page
from common.processes import ANY_PORT

HOME = {"/": lambda _: Page("home", "text/plain")}


@pytest.fixture
def serve():
    """Starts servers of one page; called with their limits, it returns the port."""
    started = []

    def start(collectors=(), pages=HOME, **limits):
        pages = HttpPages(collectors, pages, **limits)
        started.append(pages)
        return pages.start(ANY_PORT, "127.0.0.1")

    yield start
    for pages in started:
        pages.stop()


def get(port, path="/"):
    """Status and text of a page."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path)
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


def logged(lines):
    """The first line of the log, once it is there."""
    deadline = time.monotonic() + 60
    while not lines and time.monotonic() < deadline:
        time.sleep(0.01)
    return lines[0]


def test_an_answer_that_nobody_takes_is_a_line_of_the_log(serve, capfd):
    """A traceback between lines of JSON is what the collector of the logs cannot read."""
    large = {"/large": lambda _: Page("x" * 50_000_000, "text/plain")}  # more than buffers take
    port = serve(pages=large, within_s=0.1)
    with capture_logs() as lines, connect(port) as slow:
        slow.sendall(b"GET /large HTTP/1.0\r\n\r\n")
        line = logged(lines)

    assert line["event"] == "an HTTP answer was not taken in time"
    assert (line["peer"], line["path"], line["within_s"]) == ("127.0.0.1", "/large", 0.1)
    assert "exc_info" not in line
    assert capfd.readouterr().err == ""


class Broken:
    """Metrics that have a mistake, once they are registered."""

    def describe(self):
        return []

    def collect(self):
        raise ZeroDivisionError("a mistake in a metric")


def test_metrics_that_cannot_be_read_are_an_answer_and_a_line_of_the_log(serve, capfd):
    """Whoever sees the target down in Prometheus looks for the reason where all others are."""
    port = serve(collectors=[Broken()])
    with capture_logs() as lines:
        status, _ = get(port, "/metrics")

    assert status == 500
    assert logged(lines)["event"] == "an HTTP answer could not be made"
    assert isinstance(logged(lines)["exc_info"][1], ZeroDivisionError)
    assert capfd.readouterr().err == ""


def test_nobody_asks_the_dns_for_a_name_at_the_start(serve, monkeypatch):
    """Where none answers it takes seconds, in which the event loop that starts the server does nothing else."""

    def ask(*_):
        raise AssertionError("the DNS was asked")

    for name in ("getfqdn", "gethostbyaddr", "gethostbyname", "gethostbyname_ex", "getnameinfo"):
        monkeypatch.setattr(socket, name, ask)

    assert get(serve()) == (200, "home")


def test_every_process_says_how_much_memory_it_takes(serve):
    """Which process grows is asked of all of them at once."""
    _, text = get(serve(), "/metrics")

    assert "process_resident_memory_bytes" in text
    assert "process_cpu_seconds_total" in text


def test_a_first_line_without_end_is_refused(serve):
    """It would fill the memory."""
    with connect(serve()) as endless:
        endless.sendall(b"GET /" + b"x" * 65536)
        answer = endless.recv(65536)

    assert b"414" in answer.partition(b"\n")[0]
