"""Asking a scheduler what it sees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from paceline_cli.errors import CommandError, ExitCode, command_error

if TYPE_CHECKING:
    from paceline.v1 import observation_pb2 as pb

_ANSWER_S = 5.0
_MOST_BYTES = 64 * 2**20  # of an answer: a thousand requests with long histories are beyond the usual 4 MiB


@contextmanager
def observed(address: str) -> Iterator[ObservedScheduler]:
    """The scheduler at `address`, whether it is there yet or not."""
    import grpc

    options = [
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        ("grpc.max_receive_message_length", _MOST_BYTES),
    ]
    with grpc.insecure_channel(address, options=options) as channel:
        yield ObservedScheduler(address, channel)


class ObservedScheduler:
    """What there is to see of a scheduler. Everything raises `CommandError`."""

    def __init__(self, address: str, channel: Any) -> None:
        """Ask over `channel`."""
        from paceline.v1.observation_pb2_grpc import ObservationServiceStub

        self.address = address
        self._stub = ObservationServiceStub(channel)

    def start_overview(self, request_count: int) -> Any:
        """Ask for everything at a glance; `result_of` tells what came of the call."""
        from paceline.v1 import observation_pb2 as pb

        return self._stub.GetOverview.future(pb.GetOverviewRequest(request_limit=request_count), timeout=_ANSWER_S)

    def overview(self, request_count: int) -> pb.GetOverviewResponse:
        """Everything at a glance."""
        return self.result_of(self.start_overview(request_count))

    def trace(self, request_id: str) -> str:
        """Where the time of a request went, as OTLP/JSON."""
        from paceline.v1 import observation_pb2 as pb

        return self.result_of(
            self._stub.GetTrace.future(pb.GetTraceRequest(request_id=request_id), timeout=_ANSWER_S)
        ).otlp_json

    def result_of(self, call: Any) -> Any:
        """The answer of a call, waited for if it is not there yet."""
        import grpc

        try:
            return call.result()
        except grpc.RpcError as error:
            raise self._error_of(error) from error

    def _error_of(self, failure: Any) -> CommandError:
        import grpc

        from paceline.errors import error_of_call

        status = failure.code()
        if status is grpc.StatusCode.DEADLINE_EXCEEDED:
            message = f"{self.address} does not answer within {_ANSWER_S:g} s"
            return CommandError(message, "is it a scheduler, and the line to it open?", exit_code=ExitCode.UNREACHABLE)
        if status is grpc.StatusCode.UNIMPLEMENTED:
            message = f"the server at {self.address} does not let itself be observed"
            return CommandError(message, "is it a scheduler, and of this release or a later one?")
        if status is grpc.StatusCode.NOT_FOUND:
            return CommandError(
                failure.details(),
                "`paceline trace` without an id lists the requests that it knows",
                exit_code=ExitCode.REFUSED,
            )
        return command_error(error_of_call(failure))
