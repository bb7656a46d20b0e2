"""The requests that wait to be placed, in order."""

import heapq

from scheduler_svc.core.request import Request, RequestState


class WaitingQueue:
    """Requests that wait for an executor, oldest first. Adding and taking cost the logarithm of the length.

    A preempted request comes back with the arrival it had, and so before everybody who came later. A request that
    ends while it waits stays in the heap until it surfaces, or until the ended are the majority.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._heap: list[tuple[int, Request]] = []  # (arrival, request); arrivals are unique
        self._ended_count = 0
        self.token_count = 0  # known tokens of the requests that wait; they do not change while they do

    def __len__(self) -> int:
        return len(self._heap) - self._ended_count

    def push(self, request: Request) -> None:
        """Add a request that is WAITING."""
        heapq.heappush(self._heap, (request.arrival, request))
        self.token_count += len(request.token_ids)

    def first(self) -> Request | None:
        """The request whose turn it is, left where it is."""
        while self._heap and self._heap[0][1].state is RequestState.FINISHED:
            heapq.heappop(self._heap)
            self._ended_count -= 1
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Request:
        """Take the request that `first` has just returned."""
        request = heapq.heappop(self._heap)[1]
        self.token_count -= len(request.token_ids)
        return request

    def note_ended(self, request: Request) -> None:
        """A queued request has become FINISHED; its tokens are still all there."""
        self.token_count -= len(request.token_ids)
        self._ended_count += 1
        if self._ended_count > len(self._heap) // 2 + 16:
            self._heap = [entry for entry in self._heap if entry[1].state is not RequestState.FINISHED]
            heapq.heapify(self._heap)
            self._ended_count = 0

    def check_invariants(self) -> set[Request]:
        """Return the queued requests, after holding the count against them."""
        waiting = [request for _, request in self._heap if request.state is not RequestState.FINISHED]
        assert all(request.state is RequestState.WAITING for request in waiting), "a queued request is running"
        assert len(set(waiting)) == len(waiting), "a request is queued twice"
        assert len(waiting) == len(self), "the queue's length differs from what it holds"
        assert self.token_count == sum(len(r.token_ids) for r in waiting), (
            "the queue's tokens differ from what it holds"
        )
        return set(waiting)
