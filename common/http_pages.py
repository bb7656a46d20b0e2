"""The small HTTP server of a process: `/metrics` for Prometheus, and pages for people where there are some."""

from __future__ import annotations

import io
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from socketserver import TCPServer, ThreadingMixIn
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs
from wsgiref.simple_server import ServerHandler, WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import structlog
from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.registry import Collector

from common.grpc_servers import AddressError, AddressTakenError
from common.processes import ANY_PORT

log = structlog.get_logger()

_LONGEST_LINE = 65536
"""Bytes of the first line of a request."""

_HEADERS = [
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
    # Pages are whole in themselves: whatever a name that a user chose may contain, it loads and sends nothing.
    (
        "Content-Security-Policy",
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
]


@dataclass(frozen=True, slots=True)
class PageRequest:
    """What is asked for: the rest of the path behind that of the page, and the parameters."""

    rest: str = ""
    parameters: Mapping[str, str] = field(default_factory=dict)
    host: str = ""  # under which the server was reached, with the port


@dataclass(frozen=True, slots=True)
class Page:
    """What is answered."""

    content: str
    content_type: str = "application/json"
    status: str = "200 OK"


PageMaker = Callable[[PageRequest], Page]
"""Makes a page, on a thread of the server's."""


class HttpPages:
    """Answers on threads of its own, so that no event loop waits for a reader."""

    def __init__(
        self,
        collectors: Iterable[Collector],
        pages: Mapping[str, PageMaker] | None = None,
        *,
        most_connections: int = 32,
        within_s: float = 10.0,
    ) -> None:
        """Serve what `collectors` find at `/metrics`, with memory and CPU of the process, and `pages` by path: one that
        ends in `/` has pages below it.

        Each connection has a thread. One more than `most_connections` is answered with 503 at once; one that has not
        asked, or not taken its answer, within `within_s` is closed.
        """
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        for collector in collectors:
            registry.register(collector)
        self._metrics: WSGIApplication = make_wsgi_app(registry)
        self._pages = dict(pages or {})
        self._limits = most_connections, within_s
        self._server: _Server | None = None

    def start(self, port: int, host: str = "0.0.0.0", flag: str = "--metrics-port") -> int:
        """Listen; returns the port, which the system picks for `ANY_PORT`. Raises `AddressTakenError` when it is taken;
        `flag` says in its message how to choose another.
        """
        try:
            kind = _ServerOfIpv6 if ":" in host else _Server
            server = make_server(host.strip("[]"), 0 if port == ANY_PORT else port, self._answer, kind, _QuietHandler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            kind_of_error = AddressTakenError if isinstance(error, OSError) else AddressError
            raise kind_of_error(f"cannot serve HTTP on {host}:{port}: {reason}; choose another {flag}") from error
        server.set_limits(*self._limits)
        self._server = server
        threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
        return int(server.server_port)

    def stop(self) -> None:
        """Answer nobody any more."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _answer(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "/")
        if path == "/metrics":
            return self._metrics(environ, start_response)
        page = self._page(path, environ)
        content = page.content.encode()
        headers = [("Content-Type", page.content_type), ("Content-Length", str(len(content))), *_HEADERS]
        start_response(page.status, headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [content]

    def _page(self, path: str, environ: WSGIEnvironment) -> Page:
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return Page("only GET is answered here", "text/plain", "405 Method Not Allowed")
        maker, rest = self._find(path)
        if maker is None:
            there = " ".join(sorted({"/metrics", *self._pages}))
            return Page(f"nothing at this path; there are: {there}", "text/plain", "404 Not Found")
        parameters = {name: values[-1] for name, values in parse_qs(environ.get("QUERY_STRING", "")).items()}
        try:
            return maker(PageRequest(rest, parameters, environ.get("HTTP_HOST", "")))
        except TimeoutError:
            return Page("the process is too busy to show anything; ask again", "text/plain", "503 Service Unavailable")
        except Exception:
            log.exception("a page could not be made", path=path)
            return Page("this page could not be made; the log says why", "text/plain", "500 Internal Server Error")

    def _find(self, path: str) -> tuple[PageMaker | None, str]:
        if path in self._pages:
            return self._pages[path], ""
        for known, maker in self._pages.items():
            if known != "/" and known.endswith("/") and path.startswith(known):
                # WSGI texts are bytes read as Latin-1, with the percent signs resolved once already.
                return maker, path[len(known) :].encode("latin-1").decode("utf-8", "replace")
        return None, ""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 64

    def server_bind(self) -> None:
        """Bind without a question to the DNS. The base classes ask for the host's full name, which takes seconds where
        nobody answers, and this runs on event loops.
        """
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.socket.getsockname()[:2]
        self.setup_environ()

    def set_limits(self, most_connections: int, within_s: float) -> None:
        """To be called before anybody is served."""
        self._room = threading.BoundedSemaphore(most_connections)
        self.within_s = within_s

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer on a thread, where there is one left; called on the thread that accepts everybody."""
        if not self._room.acquire(blocking=False):
            _refuse(request)
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and give the thread back."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """A peer that went, or never said anything, is no news."""
        if not isinstance(sys.exception(), OSError):
            log.exception("an HTTP connection failed", peer=str(client_address))


class _ServerOfIpv6(_Server):
    address_family = socket.AF_INET6


class _QuietHandler(WSGIRequestHandler):
    server: _Server

    def setup(self) -> None:
        """Bound the time: a peer that says nothing, or a letter now and then, holds no thread for ever."""
        super().setup()
        self.connection.settimeout(self.server.within_s)  # for each write: all of the answer, or some lines before it
        self.rfile.close()
        self.rfile = io.BufferedReader(_ReadWithin(self.connection, self.server.within_s))

    def handle(self) -> None:
        """Answer one request. As the base class does it, but for who is told of mistakes."""
        self.raw_requestline = self.rfile.readline(_LONGEST_LINE + 1)
        if len(self.raw_requestline) > _LONGEST_LINE:
            self.requestline = self.request_version = self.command = ""
            self.send_error(414)
            return
        if not self.parse_request():  # which has said so
            return
        answer = _Answer(self.rfile, self.wfile, self.get_stderr(), self.get_environ())  # type: ignore[arg-type]
        answer.request_handler = self
        application = self.server.get_app()
        assert application is not None, "make_server gives it one"
        answer.run(application)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  as its caller names it
        """Not a line for every scrape."""


class _Answer(ServerHandler):
    """Tells the log what goes wrong, in lines like all others: the base class writes tracebacks to stderr."""

    request_handler: _QuietHandler

    def log_exception(
        self, exc_info: tuple[type[BaseException], BaseException, TracebackType] | tuple[None, None, None]
    ) -> None:
        """Something was raised while it was made or sent."""
        peer, path = self.request_handler.client_address[0], self.request_handler.path
        if isinstance(exc_info[1], TimeoutError):
            within_s = self.request_handler.server.within_s
            log.info("an HTTP answer was not taken in time", peer=peer, path=path, within_s=within_s)
        else:
            log.error("an HTTP answer could not be made", peer=peer, path=path, exc_info=exc_info)


class _ReadWithin(io.RawIOBase):
    """What comes over a connection, all of it within a time; `TimeoutError` after that.

    The time-out of a socket begins again with every byte.
    """

    def __init__(self, connection: socket.socket, within_s: float) -> None:
        self._connection = connection
        self._within_s = within_s
        self._until = time.monotonic() + within_s

    def readable(self) -> bool:
        """It is only for that."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Wait for the next bytes."""
        left_s = self._until - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the request did not come in time")
        self._connection.settimeout(left_s)
        try:
            return self._connection.recv_into(buffer)
        finally:
            self._connection.settimeout(self._within_s)


_FULL = (
    b"HTTP/1.0 503 Service Unavailable\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n"
    b"too many connections at once; close some, or ask again\n"
)


def _refuse(connection: socket.socket) -> None:
    """Say that there is no room. It must not wait, and need not: so few bytes fit into an empty buffer."""
    connection.setblocking(False)
    with suppress(OSError):  # the peer has gone, or has not asked yet
        connection.send(_FULL)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(65536)  # unread, it would turn the close into a reset, which can overtake the answer
