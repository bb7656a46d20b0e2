"""The `Cancel` calls of a client: how the server learns at once that nobody reads on.

The end of a call does not say it, since a broken line looks the same: the server then lets the request run on for
its `detach_timeout_s`. A `Cancel` is sent and left to itself, but kept here until it has ended, and waits for the
connection where that has just broken. What gets lost all the same, with the process for instance, costs the server
that time-out and nobody an error.
"""

import asyncio
import atexit
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakSet

import grpc

from paceline._calls import metadata
from paceline.v1 import inference_pb2 as pb
from paceline.v1.inference_pb2_grpc import InferenceServiceStub

if TYPE_CHECKING:
    from paceline.v1.inference_pb2_grpc import InferenceServiceAsyncStub  # exists for type checkers only

CANCEL_TIMEOUT_S = 2.0
"""How long a `Cancel` may take, and so how long closing a client may."""


class _Call(Protocol):
    """A call that says when it has ended."""

    def add_callback(self, callback: Callable[[], None]) -> bool: ...


class Cancels:
    """Those of a `Client`; any thread may use it."""

    def __init__(self, stub: InferenceServiceStub) -> None:
        self._stub = stub
        self._under_way: set[Any] = set()  # futures that have not ended
        self._held_back: deque[str] = deque()  # ids whose `Cancel` waits for the end of their call
        self._lock = threading.Lock()  # while ids are on their way from there to `_under_way`
        _OF_THIS_PROCESS.add(self)

    def send(self, request_id: str) -> None:
        """Send one, and do not wait for it."""
        request = pb.CancelRequest(request_id=request_id)
        with suppress(ValueError, RuntimeError):  # the channel is closed, or Python about to end: no call can be made
            call = self._stub.Cancel.future(request, timeout=CANCEL_TIMEOUT_S, wait_for_ready=True, metadata=metadata())
            self._under_way.add(call)
            call.add_done_callback(self._note_ended)

    def send_after(self, call: _Call, request_id: str) -> None:
        """Send one when `call` has ended, from gRPC's own thread.

        For the garbage collector, whose thread may be in the middle of gRPC, with its locks held.
        """
        self._held_back.append(request_id)
        call.add_callback(self._send_held_back)

    def wait(self) -> None:
        """Wait until all that were sent have ended, well or not."""
        self._send_held_back()
        for call in list(self._under_way):
            with suppress(grpc.RpcError, grpc.FutureCancelledError):
                call.result()

    def _send_held_back(self) -> None:
        with self._lock:
            while self._held_back:
                self.send(self._held_back.popleft())

    def _note_ended(self, call: object) -> None:
        self._under_way.discard(call)


_OF_THIS_PROCESS: WeakSet[Cancels] = WeakSet()


@atexit.register
def _wait_at_exit() -> None:
    """A program that ends with Ctrl-C in the middle of an answer, its client not closed, still says so."""
    for cancels in list(_OF_THIS_PROCESS):
        cancels.wait()


class AsyncCancels:
    """Those of an `AsyncClient`; to be used in its event loop, but for `send_from_anywhere`."""

    def __init__(self, stub: "InferenceServiceAsyncStub") -> None:
        self._stub = stub
        self._loop = asyncio.get_running_loop()
        self._under_way: set[grpc.aio.UnaryUnaryCall[pb.CancelRequest, pb.CancelResponse]] = set()

    def send(self, request_id: str) -> None:
        """Send one, and do not wait for it."""
        request = pb.CancelRequest(request_id=request_id)
        with suppress(grpc.aio.UsageError, asyncio.InvalidStateError):  # the channel is closed, its calls with it
            call = self._stub.Cancel(request, timeout=CANCEL_TIMEOUT_S, wait_for_ready=True, metadata=metadata())
            self._under_way.add(call)
            call.add_done_callback(self._under_way.discard)

    def send_from_anywhere(self, request_id: str) -> None:
        """Send one soon: for the garbage collector, which runs in any thread and may interrupt gRPC itself."""
        with suppress(RuntimeError):  # the loop is closed, and the connection with it
            self._loop.call_soon_threadsafe(self.send, request_id)

    async def wait(self) -> None:
        """Wait until all that were sent have ended, well or not."""
        await asyncio.gather(*[call.code() for call in self._under_way])
