"""The small HTTP server of a process: `/metrics` for Prometheus, and pages for people where there are some."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from socketserver import ThreadingMixIn
from urllib.parse import parse_qs
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import structlog
from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.registry import Collector

from common.grpc_servers import AddressError
from common.processes import ANY_PORT

log = structlog.get_logger()

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

    def __init__(self, collectors: Iterable[Collector], pages: Mapping[str, PageMaker] | None = None) -> None:
        """Serve what `collectors` find at `/metrics`, and `pages` by path: one that ends in `/` has pages below it."""
        registry = CollectorRegistry()
        for collector in collectors:
            registry.register(collector)
        self._metrics: WSGIApplication = make_wsgi_app(registry)
        self._pages = dict(pages or {})
        self._server: WSGIServer | None = None

    def start(self, port: int, host: str = "0.0.0.0", flag: str = "--metrics-port") -> int:
        """Listen; returns the port, which the system picks for `ANY_PORT`. Raises `AddressError` when it is taken;
        `flag` says in its message how to choose another.
        """
        try:
            kind = _ServerOfIpv6 if ":" in host else _Server
            server = make_server(host.strip("[]"), 0 if port == ANY_PORT else port, self._answer, kind, _QuietHandler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise AddressError(f"cannot serve HTTP on {host}:{port}: {reason}; choose another {flag}") from error
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

    def handle_error(self, request: object, client_address: object) -> None:
        """A peer that went, or never said anything, is no news."""
        if not isinstance(sys.exception(), OSError):
            log.exception("an HTTP connection failed", peer=str(client_address))


class _ServerOfIpv6(_Server):
    address_family = socket.AF_INET6


class _QuietHandler(WSGIRequestHandler):
    timeout = 30  # a peer that says nothing holds no thread for ever

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  as its caller names it
        """Not a line for every scrape."""
