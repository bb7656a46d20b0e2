"""`ObservationService`: what `paceline top` and `paceline trace` ask."""

from __future__ import annotations

import asyncio

import grpc

from common.errors import RefusedError, invalid, shown
from common.otlp_json import to_otlp_json
from common.spans import Span
from paceline.v1 import observation_pb2, observation_pb2_grpc
from scheduler_svc.engine import Engine
from scheduler_svc.observation.overview import MOST_REQUESTS, Overview

_REQUEST_LIMIT = 50


class ObservationService(observation_pb2_grpc.ObservationServiceServicer):
    """Shows people what is going on."""

    def __init__(self, overview: Overview, engine: Engine) -> None:
        """Show what these know."""
        self._overview = overview
        self._engine = engine

    async def GetOverview(
        self, request: observation_pb2.GetOverviewRequest, context: grpc.aio.ServicerContext
    ) -> observation_pb2.GetOverviewResponse:
        """Show everything at a glance."""
        if request.request_limit > MOST_REQUESTS:
            raise invalid(f"request_limit is {request.request_limit}, must be at most {MOST_REQUESTS}")
        return self._overview.make(request.request_limit or _REQUEST_LIMIT)

    async def GetTrace(
        self, request: observation_pb2.GetTraceRequest, context: grpc.aio.ServicerContext
    ) -> observation_pb2.GetTraceResponse:
        """Tell where the time of a request went."""
        spans = trace_of(self._engine, request.request_id)
        # Of a request with hundreds of chunks the text takes ten times as long as the spans: steps do not wait for it.
        return observation_pb2.GetTraceResponse(otlp_json=await asyncio.to_thread(to_otlp_json, spans))


def trace_of(engine: Engine, request_id: str) -> list[Span]:
    """The spans of a request, at the door or in. Raises `RefusedError` where it is not remembered."""
    observer, arrival = engine.observer, engine.arrivals.get(request_id)
    timeline = observer.find(request_id) if arrival is None else observer.at_door(arrival)
    if timeline is None:
        raise RefusedError(
            grpc.StatusCode.NOT_FOUND,
            f"request '{shown(request_id)}' does not run, and is not among the last that ended, or was refused: the "
            f"number of those that ended is --keep-timelines of the scheduler, and it forgets them when it restarts",
        )
    return observer.spans(timeline)
