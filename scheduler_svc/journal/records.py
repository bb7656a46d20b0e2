"""What is written down: one record for each thing that a restarted scheduler has to know.

Records hold the lists and arrays that they are given, and are encoded later, on another thread: whoever makes one must
not change these afterwards.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request was accepted: all that is needed to make it again."""

    number: int  # never used for another request
    request_id: str
    content_hash: bytes  # a repeated submit must be the same request, not only have its id
    accepted_at: float  # unix seconds
    deadline_at: float | None  # unix seconds
    prompt_ids: array[int]  # 'I'
    parameters: Mapping[str, Any]  # everything else; JSON can say it
    keys: tuple[int, ...]  # the number of each choice, in order; never used for another choice


@dataclass(frozen=True, slots=True)
class Placed:
    """A choice was placed on an executor; the last placement is kept."""

    key: int
    executor_id: str
    incarnation: int  # uint64
    epoch: int
    attempt: int
    placement_count: int  # how often it was placed, this time included


@dataclass(frozen=True, slots=True)
class Stepped:
    """A step's result is in: `token_ids[i]` was generated for the choice `keys[i]`."""

    at: float  # unix seconds
    executor_id: str
    step: int
    keys: Sequence[int]
    token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class ChoiceEnded:
    """A choice has its final output; what steps say about it no longer counts."""

    key: int
    output_ids: array[int]  # 'I'
    finish_reason: str
    error: str


@dataclass(frozen=True, slots=True)
class RequestEnded:
    """All choices of a request have ended; its result is kept until it is forgotten."""

    number: int
    at: float  # unix seconds


@dataclass(frozen=True, slots=True)
class Forgotten:
    """The result of a request is no longer kept."""

    number: int


@dataclass(frozen=True, slots=True)
class Joined:
    """An executor joined; a restarted scheduler dials it. The last message counts."""

    executor_id: str
    message: bytes  # its JoinRequest


@dataclass(frozen=True, slots=True)
class Left:
    """An executor is gone for good."""

    executor_id: str


@dataclass(frozen=True, slots=True)
class Outputs:
    """All tokens so far of *every* choice that has not ended, by key: no earlier step is needed any more."""

    outputs: Mapping[int, array[int]]  # 'I'


Record = Accepted | Placed | Stepped | ChoiceEnded | RequestEnded | Forgotten | Joined | Left | Outputs
