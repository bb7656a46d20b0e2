"""What a record changes in the tables, as statements and their rows."""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Iterator, Sequence

from scheduler_svc.journal.records import (
    Accepted,
    ChoiceEnded,
    Forgotten,
    Joined,
    Left,
    Outputs,
    Placed,
    Record,
    RequestEnded,
    Stepped,
)

Change = tuple[str, list[tuple[object, ...]]]
"""A statement, and the rows of values with which it runs."""

CLEAR = ("DELETE FROM steps", "DELETE FROM choices", "DELETE FROM requests", "DELETE FROM executors")
"""Forgets everything but `meta`."""


def changes(record: Record) -> Iterator[Change]:
    """The changes that a record stands for, in order. What names a choice or request that is gone changes nothing."""
    match record:
        case Stepped(at, executor_id, step, keys, token_ids):
            row = (at, executor_id, step, json_array(keys), json_array(token_ids))
            yield "INSERT INTO steps (at, executor_id, step, keys, token_ids) VALUES (?, ?, ?, ?, ?)", [row]
        case Accepted():
            yield from _accepted(record)
        case Placed(key, executor_id, incarnation, epoch, attempt, placement_count):
            yield (
                "UPDATE choices SET executor_id = ?, incarnation = ?, epoch = ?, attempt = ?, placement_count = ? "
                "WHERE key = ?",
                [(executor_id, f"{incarnation:016x}", epoch, attempt, placement_count, key)],
            )
        case ChoiceEnded(key, output_ids, finish_reason, error):
            yield (
                "UPDATE choices SET output = ?, finish_reason = ?, error = ? WHERE key = ?",
                [(packed(output_ids), finish_reason, error, key)],
            )
        case RequestEnded(number, at):
            yield "UPDATE requests SET ended_at = ? WHERE number = ?", [(at, number)]
        case Forgotten(number):
            yield "DELETE FROM requests WHERE number = ?", [(number,)]
        case Joined(executor_id, message):
            yield "INSERT OR REPLACE INTO executors VALUES (?, ?)", [(executor_id, message)]
        case Left(executor_id):
            yield "DELETE FROM executors WHERE executor_id = ?", [(executor_id,)]
        case Outputs(outputs):
            rows: list[tuple[object, ...]] = [(packed(ids), key) for key, ids in outputs.items()]
            yield "UPDATE choices SET output = ? WHERE key = ? AND finish_reason IS NULL", rows
            yield "DELETE FROM steps", [()]


def _accepted(record: Accepted) -> Iterator[Change]:
    yield (
        "INSERT INTO requests (number, id, content_hash, accepted_at, deadline_at, prompt, parameters) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        [
            (
                record.number,
                record.request_id,
                record.content_hash,
                record.accepted_at,
                record.deadline_at,
                packed(record.prompt_ids),
                json.dumps(record.parameters),
            )
        ],
    )
    rows: list[tuple[object, ...]] = [(key, record.number, choice) for choice, key in enumerate(record.keys)]
    yield "INSERT INTO choices (key, request, choice) VALUES (?, ?, ?)", rows


def json_array(numbers: Sequence[int]) -> str:
    """A JSON array, of numpy's numbers too."""
    return f"[{','.join(map(str, numbers))}]"


def packed(ids: array[int]) -> bytes:
    """Little-endian uint32."""
    if sys.byteorder == "big":
        ids = ids[:]
        ids.byteswap()
    return ids.tobytes()


def unpacked(data: bytes) -> array[int]:
    """The ids that were packed."""
    ids = array("I", data)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids
