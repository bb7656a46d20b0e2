"""Starts and ends executors of this machine for the autoscaler: the LauncherService over a supervisor."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc

from paceline.internal.v1 import launcher_pb2 as pb
from paceline.internal.v1 import launcher_pb2_grpc as services
from paceline_cli.supervisor import ChildCommand, DrainingError, Supervisor

NODE_TYPE = "local"  # the only one: this machine


class Launcher(services.LauncherServiceServicer):
    """Adds executors to a supervisor: the first of `commands` whose name is free, until none is."""

    def __init__(self, supervisor: Supervisor, commands: Sequence[ChildCommand]) -> None:
        self._supervisor = supervisor
        self._commands = commands
        self._launching = threading.Lock()  # held from the choice of a name until it is taken

    def ListLaunched(self, _: pb.ListLaunchedRequest, context: grpc.ServicerContext) -> pb.ListLaunchedResponse:
        """List those that are there."""
        listed = {child.name: child for child in self._supervisor.added}
        executors = [
            pb.LaunchedExecutor(
                executor_id=child.name,
                node_type=NODE_TYPE,
                age_ms=int(child.age_s * 1000),
                is_running=child.is_running,
                is_retired=child.is_retired,
                last_failure=child.last_failure,
            )
            for command in self._commands
            if (child := listed.get(command.name))
        ]
        return pb.ListLaunchedResponse(executors=executors)

    def Launch(self, request: pb.LaunchRequest, context: grpc.ServicerContext) -> pb.LaunchResponse:
        """Start one more."""
        if request.node_type not in ("", NODE_TYPE):
            message = f"there is no node type '{request.node_type}' here; leave it unset, or ask for '{NODE_TYPE}'"
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, message)
        with self._launching:
            taken = {child.name for child in self._supervisor.added}
            command = next((command for command in self._commands if command.name not in taken), None)
            if command is None:
                count = len(self._commands)
                message = f"all {count} executors that this machine is divided by are there; restart serve for more"
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, message)
            assert command is not None
            try:
                self._supervisor.add(command)
            except (DrainingError, OSError) as error:
                context.abort(grpc.StatusCode.UNAVAILABLE, f"{command.name} cannot be launched: {error}")
        return pb.LaunchResponse(executor_id=command.name)

    def Retire(self, request: pb.RetireRequest, context: grpc.ServicerContext) -> pb.RetireResponse:
        """Start it no more when it ends."""
        self._supervisor.retire(request.executor_id)
        return pb.RetireResponse()

    def Terminate(self, request: pb.TerminateRequest, context: grpc.ServicerContext) -> pb.TerminateResponse:
        """End it."""
        self._supervisor.terminate(request.executor_id)
        return pb.TerminateResponse()


@contextmanager
def launching(supervisor: Supervisor, commands: Sequence[ChildCommand], address: str) -> Iterator[None]:
    """Serve a launcher at `address` while entered."""
    server = grpc.server(ThreadPoolExecutor(max_workers=4, thread_name_prefix="launcher"))
    services.add_LauncherServiceServicer_to_server(Launcher(supervisor, commands), server)
    server.add_insecure_port(address)
    server.start()
    try:
        yield
    finally:
        server.stop(grace=None).wait()
