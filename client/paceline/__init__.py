"""Client for Paceline: streaming text from a large language model over gRPC.

    from paceline import Client

    with Client("localhost:50051") as client:
        for chunk in client.generate("The capital of France is", max_output_tokens=16):
            print(chunk.text, end="", flush=True)

`AsyncClient` is the same with `await`. What can go wrong, and what to do then, is one table: `paceline.errors`.
"""

from paceline.aio import AsyncClient, AsyncStream
from paceline.client import Client, Stream
from paceline.errors import (
    AnswerLost,
    Cancelled,
    InvalidRequest,
    Overloaded,
    PacelineError,
    ServerError,
    TimedOut,
    Unavailable,
)
from paceline.types import Choice, Chunk, FinishReason, Model, Output, Usage

__all__ = [
    "AnswerLost",
    "AsyncClient",
    "AsyncStream",
    "Cancelled",
    "Choice",
    "Chunk",
    "Client",
    "FinishReason",
    "InvalidRequest",
    "Model",
    "Output",
    "Overloaded",
    "PacelineError",
    "ServerError",
    "Stream",
    "TimedOut",
    "Unavailable",
    "Usage",
]
