"""What a journal remembers, as its next owner receives it."""

from __future__ import annotations

import json
import sqlite3
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scheduler_svc.journal.changes import unpacked


@dataclass(frozen=True, slots=True)
class RestoredChoice:
    """One continuation of a request."""

    key: int
    choice: int
    output_ids: array[int]  # 'I': every token that was written down
    finish_reason: str | None  # None: has not ended
    error: str
    executor_id: str | None  # where it was placed last; None: nowhere yet, and the next three are 0
    incarnation: int
    epoch: int
    attempt: int
    placement_count: int


@dataclass(frozen=True, slots=True)
class RestoredRequest:
    """A request that was accepted and is not forgotten."""

    number: int
    request_id: str
    content_hash: bytes
    accepted_at: float
    deadline_at: float | None
    ended_at: float | None  # None: some of its choices have not ended
    prompt_ids: array[int]
    parameters: Mapping[str, Any]
    choices: list[RestoredChoice]


@dataclass(frozen=True, slots=True)
class Restored:
    """Everything in a journal; the defaults are those of a new one."""

    requests: list[RestoredRequest] = field(default_factory=list)  # in order of their numbers
    joined: list[bytes] = field(default_factory=list)  # messages of the executors that had joined, by executor id
    epoch: int = 0  # the highest that a scheduler has used
    next_number: int = 1  # above every request's
    next_key: int = 1  # above every choice's, also of those that are gone and that steps still name
    step_count: int = 0  # steps that are not part of the choices' own output yet


def restore(connection: sqlite3.Connection) -> Restored:
    """Read everything, as of one moment."""
    connection.execute("BEGIN")
    try:
        requests = _requests(connection)
        choices = {choice.key: choice for request in requests for choice in request.choices}
        highest_key, step_count = _add_steps(connection, choices)
        return Restored(
            requests=requests,
            joined=[row[0] for row in connection.execute("SELECT joined FROM executors ORDER BY executor_id")],
            epoch=connection.execute("SELECT value FROM meta WHERE name = 'epoch'").fetchone()[0],
            next_number=max((request.number for request in requests), default=0) + 1,
            next_key=max(highest_key, *choices, 0) + 1,
            step_count=step_count,
        )
    finally:
        connection.execute("ROLLBACK")


def _requests(connection: sqlite3.Connection) -> list[RestoredRequest]:
    choices: dict[int, list[RestoredChoice]] = {}
    for row in connection.execute("SELECT * FROM choices ORDER BY request, choice"):
        key, request, choice, output, finish_reason, error, executor_id, incarnation, epoch, attempt, count = row
        placement = (executor_id, int(incarnation or "0", 16), epoch or 0, attempt or 0, count)
        restored = RestoredChoice(key, choice, unpacked(output), finish_reason, error, *placement)
        choices.setdefault(request, []).append(restored)
    query = (
        "SELECT number, id, content_hash, accepted_at, deadline_at, ended_at, prompt, parameters "
        "FROM requests ORDER BY number"
    )
    return [
        RestoredRequest(
            number=number,
            request_id=request_id,
            content_hash=content_hash,
            accepted_at=accepted_at,
            deadline_at=deadline_at,
            ended_at=ended_at,
            prompt_ids=unpacked(prompt),
            parameters=json.loads(parameters),
            choices=choices.get(number, []),
        )
        for number, request_id, content_hash, accepted_at, deadline_at, ended_at, prompt, parameters in (
            connection.execute(query)
        )
    ]


def _add_steps(connection: sqlite3.Connection, choices: dict[int, RestoredChoice]) -> tuple[int, int]:
    """Give the choices that have not ended their latest tokens; returns the highest key seen and the count of steps."""
    outputs = {key: choice.output_ids for key, choice in choices.items() if choice.finish_reason is None}
    highest_key = step_count = 0
    for keys_text, token_ids in connection.execute("SELECT keys, token_ids FROM steps ORDER BY number"):
        keys = json.loads(keys_text)
        for key, token_id in zip(keys, json.loads(token_ids), strict=True):
            if (output := outputs.get(key)) is not None:
                output.append(token_id)
        highest_key = max(highest_key, *keys, 0)
        step_count += 1
    return highest_key, step_count
