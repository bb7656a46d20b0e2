"""When somebody's deadline has to be looked at."""

from __future__ import annotations

import heapq

from scheduler_svc.core.request import Request, RequestState


class Moments:
    """The next moment to look at each request that has a deadline, earliest first. Adding costs the logarithm."""

    def __init__(self) -> None:
        """Start with nobody."""
        self._heap: list[tuple[float, int, Request]] = []  # (moment, arrival, request)
        self._ended_count = 0  # how many of them have ended: never the majority for long

    def add(self, request: Request, moment: float) -> None:
        """Look at a request at this moment."""
        heapq.heappush(self._heap, (moment, request.arrival, request))

    def first(self) -> tuple[float, Request] | None:
        """The earliest moment, and who is to be looked at."""
        while self._heap and self._heap[0][2].state is RequestState.FINISHED:
            heapq.heappop(self._heap)
            self._ended_count -= 1
        return (self._heap[0][0], self._heap[0][2]) if self._heap else None

    def put_off(self, moment: float) -> None:
        """Look at whom `first` has just returned at this moment instead."""
        request = self._heap[0][2]
        heapq.heapreplace(self._heap, (moment, request.arrival, request))

    def note_ended(self) -> None:
        """Somebody here has become FINISHED; let go of the ended ones when they become the majority."""
        self._ended_count += 1
        if self._ended_count > len(self._heap) // 2 + 16:
            self._heap = [entry for entry in self._heap if entry[2].state is not RequestState.FINISHED]
            heapq.heapify(self._heap)
            self._ended_count = 0

    def check_invariants(self) -> None:
        """Hold the count of those that have ended against who is there."""
        ended = sum(entry[2].state is RequestState.FINISHED for entry in self._heap)
        assert ended == self._ended_count, "the ended requests in the heap of deadlines are miscounted"


def too_late_message(request: Request, now: float) -> str:
    """Why the request is refused before its deadline; empty when that has passed."""
    if now >= request.deadline:
        return ""
    return (
        f"request '{request.request_id}' is refused {request.deadline - now:.3g} s before its deadline: the "
        f"{len(request.token_ids)} tokens before its next one cannot be computed in that time; allow more time or "
        f"shorten the prompt"
    )
