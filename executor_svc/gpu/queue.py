"""In which order a device works: steps one after the other, copies of what they read beside them.

`CudaQueue` is a GPU. `HostQueue` stands in for one where there is none, with kernels that are interpreted: whatever is
queued has run at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True, slots=True)
class Recording:
    """Work that can be queued again as a whole."""

    replay: Callable[[], object]
    output: torch.Tensor  # of the work, where every replay leaves it


class Moment(Protocol):
    """A point in what was queued."""

    def await_on_host(self) -> None:
        """Return once the device is there. Raises what the device failed with before."""
        ...

    def await_on_device(self) -> None:
        """Have what is queued from now on run after it."""
        ...

    def seconds_since(self, earlier: Any) -> float:
        """Between two moments that are over, on the device's clock."""
        ...


class Queue(Protocol):
    """What a device has been given to do."""

    device: torch.device

    def steps(self) -> AbstractContextManager[None]:
        """Queue steps, in the order of calls."""
        ...

    def copies(self) -> AbstractContextManager[None]:
        """Queue copies that run beside steps."""
        ...

    def host_words(self, count: int) -> torch.Tensor:
        """Memory of the host from which the device can copy by itself, `[count]` int32."""
        ...

    def mark(self) -> Moment:
        """The moment at which everything queued so far in the present context has run."""
        ...

    def record(self, work: Callable[[], torch.Tensor]) -> Recording:
        """What does the same work again, at the same places in memory; called in the context of `steps`.

        The work must have run before: what is compiled or loaded then cannot be recorded.
        """
        ...


class CudaQueue:
    """One GPU, with a stream for steps and one for copies."""

    def __init__(self, device: torch.device) -> None:
        """Queue nothing yet."""
        self.device = device
        self._steps = torch.cuda.Stream(device)
        self._copies = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()  # recorded work never overlaps, so it shares its memory

    @contextmanager
    def steps(self) -> Iterator[None]:
        """Queue steps, in the order of calls."""
        with torch.cuda.stream(self._steps):
            yield

    @contextmanager
    def copies(self) -> Iterator[None]:
        """Queue copies that run beside steps."""
        with torch.cuda.stream(self._copies):
            yield

    def host_words(self, count: int) -> torch.Tensor:
        """Memory of the host that does not move, `[count]` int32."""
        return torch.zeros(count, dtype=torch.int32, pin_memory=True)

    def mark(self) -> Moment:
        """An event on the stream of the present context."""
        return _CudaMoment()

    def record(self, work: Callable[[], torch.Tensor]) -> Recording:
        """A CUDA graph of the work.

        What waits for the device is refused before recording begins: it would end the recording, and up to torch 2.11
        the allocator goes on as if one were under way, and raises when it is next told to give memory back.
        """
        torch.cuda.set_sync_debug_mode("error")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            try:
                output = work()
            finally:
                graph.capture_end()
        except BaseException:
            with suppress(RuntimeError, AttributeError):  # it has been told already, as it should have been
                end = torch.cuda.memory._cuda_endAllocateToPool  # type: ignore[attr-defined]  # torch has no public one
                end(torch.cuda.current_device(), self._pool)
            self._pool = torch.cuda.graph_pool_handle()  # the allocator of pinned memory does not let go of the other
            raise
        return Recording(graph.replay, output)


class _CudaMoment:
    def __init__(self) -> None:
        # Blocking: whoever waits for a step of milliseconds leaves the core to others meanwhile.
        self._event = torch.cuda.Event(enable_timing=True, blocking=True)
        self._event.record()

    def await_on_host(self) -> None:
        self._event.synchronize()

    def await_on_device(self) -> None:
        self._event.wait()

    def seconds_since(self, earlier: Any) -> float:
        return earlier._event.elapsed_time(self._event) / 1e3


class HostQueue:
    """No device: what is queued runs at once, and what is recorded is called again."""

    def __init__(self, device: torch.device | None = None) -> None:
        """Nothing is ever left to do."""
        self.device = device or torch.device("cpu")

    def steps(self) -> AbstractContextManager[None]:
        """Run what follows."""
        return nullcontext()

    def copies(self) -> AbstractContextManager[None]:
        """Run what follows."""
        return nullcontext()

    def host_words(self, count: int) -> torch.Tensor:
        """Plain memory, `[count]` int32."""
        return torch.zeros(count, dtype=torch.int32)

    def mark(self) -> Moment:
        """Now."""
        return _HostMoment()

    def record(self, work: Callable[[], torch.Tensor]) -> Recording:
        """The work itself, and a place for what it gives."""
        output = work()
        return Recording(lambda: output.copy_(work()), output)


class _HostMoment:
    def __init__(self) -> None:
        self._at = time.perf_counter()

    def await_on_host(self) -> None:
        """It is over."""

    def await_on_device(self) -> None:
        """It is over."""

    def seconds_since(self, earlier: Any) -> float:
        return self._at - earlier._at


def moment_on(device: torch.device) -> Moment:
    """The moment at which everything queued so far on the device's present stream has run."""
    return _CudaMoment() if device.type == "cuda" else _HostMoment()


def queue_for(device: torch.device) -> Queue:
    """The queue of a device."""
    return CudaQueue(device) if device.type == "cuda" else HostQueue(device)
