"""`paceline health`: is the server there and taking requests? Container healthchecks call it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from paceline_cli import terminal
from paceline_cli.errors import CommandError, ExitCode
from paceline_cli.flags import DEFAULT_SERVER, flag

SERVING = "SERVING"
_REASON_S = 0.2  # for the reason why there was no connection: known already, or there is none


def health(
    address: Annotated[str, typer.Argument(help="host:port or unix:/path.")] = DEFAULT_SERVER,
    service: Annotated[str, flag("--service", "Ask about one gRPC service only.", metavar="NAME")] = "",
    timeout: Annotated[
        float,
        flag("--timeout", "Time to wait for an answer.", envvar="PACELINE_HEALTH_TIMEOUT", metavar="SECONDS", min=0.1),
    ] = 3.0,
) -> None:
    """Ask a scheduler or an executor how it is (grpc.health.v1); exit code 0 if it serves, 3 if not.

    [dim]$[/] paceline health localhost:50051
    """
    status = check_health(address, service, timeout)
    if status != SERVING:
        raise CommandError(f"{address} is {status}", exit_code=ExitCode.UNREACHABLE)
    terminal.stdout().print(f"[green]{status}[/]")


def check_health(address: str, service: str = "", timeout_s: float = 3.0) -> str:
    """The serving status at `address` in words; raises `CommandError` when nobody answers."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s, wait_for_ready=True)
        except grpc.RpcError as error:
            reason = error.details()
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                reason = f"none came within {timeout_s:g} s{_why_not_connected(stub)}"
            raise CommandError(
                f"no healthy answer from {address}: {reason}",
                "is the server running, and is this its address?",
                exit_code=ExitCode.UNREACHABLE,
            ) from error
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def _why_not_connected(stub: Any) -> str:
    """What the connection failed with last, to be added to a message; "" if it did not fail.

    A call that waits for the server, as a start may take a moment, does not say.
    """
    import grpc
    from grpc_health.v1 import health_pb2

    try:
        stub.Check(health_pb2.HealthCheckRequest(), timeout=_REASON_S)
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            reason = (error.details() or "").rpartition(": ")[2]  # before it, every address that a name stands for
            return f" ({reason})"
    return ""
