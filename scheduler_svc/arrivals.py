"""Requests at the door: received, and not accepted yet."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

from scheduler_svc.core.request import TraceContext
from scheduler_svc.load_meter import LoadMeter
from scheduler_svc.refusals import cancelled


class Hold(Enum):
    """What a request is held at the door for."""

    EXECUTOR = "the first executor"  # who alone knows what the model takes
    ROOM = "room in the queue"  # a request of a batch, which is not refused


@dataclass(slots=True, eq=False)
class Arrival:
    """A request at the door."""

    request_id: str
    received_at: float  # on the clock of the event loop
    trace: TraceContext  # its own span's, whatever becomes of it
    operation: str = "text_completion"  # as traces name it: that, or `chat`
    method: str = "Generate"  # the call that it came with
    held_for: tuple[str, ...] = ()  # what it had to wait for, one after the other
    is_cancelled: bool = False
    is_over: asyncio.Event = field(default_factory=asyncio.Event)


class Arrivals:
    """Everybody at the door, by id, and who of them is held there. Who is not held costs an entry, and no more."""

    def __init__(self, meter: LoadMeter) -> None:
        """Start with nobody; `meter` is told how long they were held."""
        self._meter = meter
        self._arrivals: dict[str, Arrival] = {}
        self._held: dict[Hold, dict[Arrival, float]] = {hold: {} for hold in Hold}  # since when, the oldest first

    @contextmanager
    def arriving(self, arrival: Arrival) -> Iterator[None]:
        """Keep a request that is nowhere yet, so that it can be found, and cancelled, at the door."""
        self._arrivals[arrival.request_id] = arrival
        try:
            yield
        finally:
            del self._arrivals[arrival.request_id]
            arrival.is_over.set()

    @contextmanager
    def held(self, arrival: Arrival, hold: Hold) -> Iterator[None]:
        """A request has to wait before it can be accepted."""
        since = self._held[hold][arrival] = time.monotonic()
        arrival.held_for += (hold.value,)
        if hold is Hold.EXECUTOR:
            self._meter.tell_at_once()  # somebody has to start one
        try:
            yield
        finally:
            del self._held[hold][arrival]
            now = time.monotonic()
            self._meter.door.note(now, now - since)

    async def settled(self, request_id: str) -> None:
        """Wait until no request of that id is at the door. Raises `RefusedError` when it was cancelled there."""
        while (arrival := self._arrivals.get(request_id)) is not None:
            await arrival.is_over.wait()
            if arrival.is_cancelled:
                raise cancelled(request_id)

    def cancel(self, request_id: str) -> bool:
        """Nobody wants that request any more; False: it is not at the door."""
        arrival = self._arrivals.get(request_id)
        if arrival is not None:
            arrival.is_cancelled = True
        return arrival is not None

    def get(self, request_id: str) -> Arrival | None:
        """The request of that id, if it is at the door."""
        return self._arrivals.get(request_id)

    def all_held(self) -> list[Arrival]:
        """Everybody who is held, whatever for, the oldest first."""
        held = [arrival for hold in self._held.values() for arrival in hold]
        return sorted(held, key=lambda arrival: arrival.received_at)

    def held_count(self, *holds: Hold) -> int:
        """How many are held for one of these."""
        return sum(len(self._held[hold]) for hold in holds)

    def held_since(self, *holds: Hold) -> float | None:
        """Since when the first of them is; None: nobody is."""
        oldest = [next(iter(list(self._held[hold].values())), None) for hold in holds]  # read from other threads too
        return min((since for since in oldest if since is not None), default=None)
