"""Executors as processes of one machine, started and ended by whoever serves the LauncherService there."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import TypeVar

import grpc

from autoscaler_svc.actuators.actuator import ActuatorError, Launched, NoRoomError
from common.grpc_servers import open_channel
from paceline.internal.v1 import launcher_pb2 as pb
from paceline.internal.v1.launcher_pb2_grpc import LauncherServiceStub

_TIMEOUT_S = 5.0

_Response = TypeVar("_Response")


class ProcessActuator:
    """An `Actuator` that asks the launcher at `address`. To be made in the event loop that uses it."""

    def __init__(self, address: str, timeout_s: float = _TIMEOUT_S) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._channel = open_channel(address)
        self._stub = LauncherServiceStub(self._channel)

    async def list(self) -> Sequence[Launched]:
        """See `Actuator`."""
        request = pb.ListLaunchedRequest()
        response = await self._answer(self._stub.ListLaunched(request, timeout=self._timeout_s), "list")
        return [
            Launched(
                executor_id=executor.executor_id,
                node_type=executor.node_type,
                age_s=executor.age_ms / 1000,
                is_running=executor.is_running,
                is_retired=executor.is_retired,
                last_failure=executor.last_failure,
            )
            for executor in response.executors
        ]

    async def launch(self, node_type: str) -> str:
        """See `Actuator`."""
        request = pb.LaunchRequest(node_type=node_type)
        response = await self._answer(self._stub.Launch(request, timeout=self._timeout_s), "launch")
        return str(response.executor_id)

    async def retire(self, executor_id: str) -> None:
        """See `Actuator`."""
        request = pb.RetireRequest(executor_id=executor_id)
        await self._answer(self._stub.Retire(request, timeout=self._timeout_s), "retire")

    async def terminate(self, executor_id: str) -> None:
        """See `Actuator`."""
        request = pb.TerminateRequest(executor_id=executor_id)
        await self._answer(self._stub.Terminate(request, timeout=self._timeout_s), "terminate")

    async def close(self) -> None:
        """See `Actuator`."""
        await self._channel.close()

    async def _answer(self, call: Awaitable[_Response], what: str) -> _Response:
        """The answer to a call; every status but OK becomes an `ActuatorError` with the launcher's words."""
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise NoRoomError(error.details()) from error
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                message = f"the launcher at '{self._address}' has not answered '{what}' within {self._timeout_s:g} s"
                raise ActuatorError(message) from error
            message = f"the launcher at '{self._address}' refuses '{what}': {error.details()} ({error.code().name})"
            raise ActuatorError(message) from error
