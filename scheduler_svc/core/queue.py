"""The requests that wait to be placed, in order."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from scheduler_svc.core.policies import Policy
from scheduler_svc.core.request import Rank, Request, RequestState


@dataclass(slots=True)
class _Line:
    """Requests that wait in one order."""

    heap: list[tuple[Rank, Request]] = field(default_factory=list)  # ranks are unique
    waiting_count: int = 0  # those that have not ended, in the heap or skipped; at least 1


class WaitingQueue:
    """Requests that wait for an executor, strongest claim first. Adding and taking cost the logarithm of the length.

    A preempted request comes back with the rank it had, and so before everybody whose claim is weaker. A request that
    ends while it waits stays in its heap until it surfaces, or until the ended are the majority.
    """

    def __init__(self, policy: Policy) -> None:
        """Start empty."""
        self._policy = policy
        self._lines: dict[str, _Line] = {}  # those in which somebody waits
        self._skipped: list[Request] = []  # taken out of their heaps to see who comes after them
        self._length = 0
        self.token_count = 0  # known tokens of the requests that wait; they do not change while they do

    def __len__(self) -> int:
        return self._length

    def push(self, request: Request) -> None:
        """Add a request that is WAITING."""
        name = self._policy.line(request)
        line = self._lines.get(name)
        if line is None:
            self._policy.begin_line(name, self._lines.keys())
            line = self._lines[name] = _Line()
        heapq.heappush(line.heap, (request.rank, request))
        line.waiting_count += 1
        self._length += 1
        self.token_count += len(request.token_ids)

    def first(self) -> Request | None:
        """The request whose turn it is, left where it is."""
        if not self._lines:
            return None
        heap = self._lines[self._policy.next_line(self._lines.keys())].heap
        while heap and heap[0][1].state is RequestState.FINISHED:
            heapq.heappop(heap)
        return heap[0][1] if heap else None

    def pop(self, request: Request) -> None:
        """Take the request that `first` has just returned."""
        taken = heapq.heappop(self._lines[self._policy.line(request)].heap)[1]
        assert taken is request, "it was not the turn of the request that is taken"
        self._leave(request)

    def withdraw(self, request: Request) -> bool:
        """Take a request out of the middle, whether it was its turn or not; False when it is not queued.

        Costs the length of its line.
        """
        line = self._lines.get(self._policy.line(request))
        if line is None or (request.rank, request) not in line.heap:
            return False
        line.heap.remove((request.rank, request))
        heapq.heapify(line.heap)
        self._leave(request)
        return True

    def skip(self, request: Request) -> None:
        """Look past the request that `first` has just returned, until `unskip`. It still waits in its line."""
        heapq.heappop(self._lines[self._policy.line(request)].heap)
        self._skipped.append(request)

    def pop_skipped(self, request: Request) -> None:
        """Take a request that was looked past."""
        self._skipped.remove(request)
        self._leave(request)

    def unskip(self) -> None:
        """Put those that were looked past back in their places."""
        for request in self._skipped:
            if request.state is RequestState.WAITING:
                heapq.heappush(self._lines[self._policy.line(request)].heap, (request.rank, request))
        self._skipped.clear()

    def note_ended(self, request: Request) -> None:
        """A queued request has become FINISHED; its tokens are still all there."""
        self._leave(request)
        line = self._lines.get(self._policy.line(request))
        if line is not None and len(line.heap) > 2 * line.waiting_count + 16:
            line.heap = [entry for entry in line.heap if entry[1].state is not RequestState.FINISHED]
            heapq.heapify(line.heap)

    def _leave(self, request: Request) -> None:
        name = self._policy.line(request)
        line = self._lines[name]
        line.waiting_count -= 1
        if not line.waiting_count:
            del self._lines[name]
        self._length -= 1
        self.token_count -= len(request.token_ids)

    def check_invariants(self) -> set[Request]:
        """Return the queued requests, after holding the counts against them."""
        waiting = []
        for line in self._lines.values():
            there = [request for _, request in line.heap if request.state is not RequestState.FINISHED]
            assert len(there) == line.waiting_count > 0, "a line's count differs from who waits in it"
            waiting += there
        assert all(request.state is RequestState.WAITING for request in waiting), "a queued request is running"
        assert len(set(waiting)) == len(waiting) == len(self), "a request is queued twice, or the length is wrong"
        assert self.token_count == sum(len(r.token_ids) for r in waiting), (
            "the queue's tokens differ from what it holds"
        )
        return set(waiting)
