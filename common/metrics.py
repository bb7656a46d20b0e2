"""The Prometheus endpoint of a process: `http://HOST:PORT/metrics`."""

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.registry import Collector

from common.grpc_servers import AddressError


def serve_metrics(port: int, *collectors: Collector, host: str = "0.0.0.0") -> int:
    """Answer scrapes on a thread of its own with what `collectors` find at that moment; returns the port.

    Port 0 picks one. Raises `AddressError` when it is taken.
    """
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    try:
        server, _ = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise AddressError(
            f"cannot serve metrics on port {port}: {error.strerror}; choose another --metrics-port"
        ) from error
    return int(server.server_port)
