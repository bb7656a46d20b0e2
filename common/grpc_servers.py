"""gRPC servers and channels as every service here sets them up."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

PUBLIC_MESSAGE_BYTES = 64 * 1024 * 1024
"""Largest message a service takes. Prompts are limited below it, by checks that can say why."""

_COMMON_OPTIONS = (
    ("grpc.max_receive_message_length", PUBLIC_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
)

CHANNEL_OPTIONS = (
    *_COMMON_OPTIONS,
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # without it the answer to a ping is waited for for a minute
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A peer that comes back at the same address is found again at once, not after gRPC's two minutes of patience.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
)

_SERVER_OPTIONS = (
    *_COMMON_OPTIONS,
    ("grpc.so_reuseport", 0),  # with it a second server on the port would start without a word
    ("grpc.http2.max_ping_strikes", 0),  # clients that keep quiet streams alive are welcome
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
)


class AddressError(ValueError):
    """An address that cannot be listened on."""


class AddressTakenError(AddressError):
    """One that cannot be listened on now: whoever has it may let it go, so that trying again can help."""


class Server:
    """A gRPC server with health and reflection, bound to its addresses.

    Register servicers on `grpc`, then `start`. `health` answers for every service at once: serving, or not.
    """

    def __init__(self, interceptors: Sequence[grpc.aio.ServerInterceptor] = ()) -> None:
        """Make a server that listens nowhere yet."""
        self.grpc = grpc.aio.server(options=_SERVER_OPTIONS, interceptors=list(interceptors))
        self._health = health.aio.HealthServicer()
        self._services: tuple[str, ...] = ()

    async def start(self, addresses: Iterable[str], services: Sequence[str]) -> list[str]:
        """Bind and start; returns the addresses with the ports that were picked for port 0.

        Raises `AddressError` when an address is malformed, `AddressTakenError` when it is taken. `services` are the
        full names that reflection and health know. Health says NOT_SERVING until `set_serving`.
        """
        self._services = ("", *services)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.grpc)
        bound = [bind(self.grpc, address) for address in addresses]
        await self.set_serving(False)
        await self.grpc.start()
        return bound

    async def set_serving(self, serving: bool) -> None:
        """Tell health checks whether to send work here."""
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in self._services:
            await self._health.set(service, state)

    async def set_state(self, name: str, *, serving: bool) -> None:
        """Tell health checks how something is that has a name of its own."""
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        await self._health.set(name, state)

    async def stop(self, grace_s: float = 0.0) -> None:
        """Refuse new calls, give running ones `grace_s`, then end them."""
        await self.grpc.stop(grace_s)


def bind(server: grpc.aio.Server, address: str) -> str:
    """Listen on `host:port` or `unix:/path`; returns the address with the real port."""
    if not address.startswith("unix:"):
        check_host_port(address)
    elif _answers(address.removeprefix("unix:")):
        raise AddressTakenError(
            f"cannot listen on '{address}': the socket is in use; choose another path, or stop what uses it"
        )
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        if address.startswith("unix:"):
            raise AddressTakenError(
                f"cannot listen on '{address}': is the folder there, and the path short enough?"
            ) from error
        number = address.rpartition(":")[2]
        raise AddressTakenError(
            f"cannot listen on '{address}': port {number} is in use, or the host is not this machine; "
            f"choose another port, or stop what uses it"
        ) from error
    return address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"


def _answers(path: str) -> bool:
    """Whether a process listens on the socket at `path`. Asked because gRPC takes it away without a word.

    What a dead process left behind refuses the connection, and may be taken.
    """
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:  # listens, and is busy
            return True
        except OSError:
            return False
    return True


def check_host_port(address: str) -> None:
    """Refuse an address that is not `host:port`."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise AddressError(f"'{address}' is not an address: give host:port with a port of 0 to 65535, or unix:/path")


def reachable(address: str, peer: str) -> str:
    """The address under which the process at `peer` reaches a server that listens on `address`.

    Raises `AddressError` when that cannot be told: it listens everywhere, and the peer is on another machine.
    """
    host, _, port = address.rpartition(":")
    if not _is(host, "is_unspecified"):
        return address
    peer_host = peer.rpartition(":")[0]
    if not peer.startswith("unix:") and peer_host != "localhost" and not _is(peer_host, "is_loopback"):
        raise AddressError(
            f"'{address}' is every address of this machine, and '{peer}' has to be told one of them; "
            f"say which with --advertise HOST:{port}"
        )
    return f"127.0.0.1:{port}"


def own_host(peer: str) -> str:
    """The address of this machine that `peer`, `host:port` or `unix:/path`, sees it under; nothing is sent.

    Raises `OSError` when the peer's host cannot be resolved.
    """
    if peer.startswith("unix:"):
        return "127.0.0.1"
    host, _, port = peer.rpartition(":")
    family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _is(host: str, kind: str) -> bool:
    """Whether `host` is an IP address of that kind."""
    try:
        return bool(getattr(ipaddress.ip_address(host.strip("[]")), kind))
    except ValueError:
        return False


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to another service of ours."""
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
