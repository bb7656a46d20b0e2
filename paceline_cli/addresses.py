"""Where things listen: ports, sockets in a private folder, and what answers there."""

from __future__ import annotations

import errno
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.processes import ANY_PORT
from paceline_cli.errors import CommandError, ExitCode

_LONGEST_SOCKET_PATH = 100  # the kernel takes 107 bytes, macOS 103


def reserve_port(host: str, port: int, host_flag: str = "--host", port_flag: str = "--port") -> int:
    """Check that `port` can be listened on and return it; port 0 picks a free one.

    The server would find out too, but later and in another process. Errors name the flags.
    """
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror:
        raise CommandError(
            f"{host_flag} {host!r} is not an address of this machine",
            "use 127.0.0.1 for this machine only, or 0.0.0.0 for everybody",
            exit_code=ExitCode.USAGE,
        ) from None
    with socket.socket(address[0], socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address[4])
        except OSError as error:
            raise _cannot_listen(host, port, error, host_flag, port_flag) from None
        return int(probe.getsockname()[1])


def _cannot_listen(host: str, port: int, error: OSError, host_flag: str, port_flag: str) -> CommandError:
    if error.errno == errno.EADDRINUSE:
        any_port = 0 if port_flag == "--port" else ANY_PORT
        return CommandError(
            f"port {port} is in use on {host}",
            f"stop what listens there, or choose another: {port_flag} {any_port} picks a free one",
        )
    if error.errno == errno.EACCES:
        return CommandError(f"port {port} needs privileges", f"choose one above 1023 with {port_flag}")
    return CommandError(
        f"cannot listen on {host}:{port}: {error.strerror}", f"choose others with {host_flag} and {port_flag}"
    )


def dial_address(host: str, port: int) -> str:
    """What a client on this machine types to reach a server that listens on `host`."""
    if host in ("0.0.0.0", "::", ""):
        host = "127.0.0.1"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen_address(host: str, port: int) -> str:
    """`host:port`, with the brackets that an IPv6 host needs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextmanager
def socket_folder() -> Iterator[Path]:
    """A folder for unix sockets that only this user can enter; gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="paceline-"))
    if len(str(folder)) > _LONGEST_SOCKET_PATH - len("/executor-000.sock"):
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="paceline-", dir="/tmp"))  # TMPDIR is too deep for a socket
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
