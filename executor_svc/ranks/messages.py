"""What rank 0 tells the others before each step, and what they answer: a few arrays, end to end, in bytes.

Of the block tables only entries go that differ from those of the last step in the same slots: most steps change few.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import IntEnum

import numpy as np
from numpy.typing import DTypeLike, NDArray

from executor_svc.batch import IntArray, SamplingBatch, StepBatch

_ANSWER = struct.Struct("<q")
_SAMPLING_TYPES: dict[str, DTypeLike] = {"temperature": "<f4", "top_p": "<f4", "min_p": "<f4", "seed": "<u8"}


class Kind(IntEnum):
    """What a rank is to do."""

    STEP = 0
    COPY = 1  # blocks
    CHECK = 2  # the device


@dataclass(frozen=True, slots=True)
class Order:
    """One message of rank 0."""

    number: int  # one more than that of the order before; 0 is loading the model, which needs none
    kind: Kind
    batch: StepBatch | None = None
    sources: IntArray | None = None  # of copies
    destinations: IntArray | None = None


class Orders:
    """Writes orders, or reads them. Both ends remember the block tables, and so have to see every step."""

    def __init__(self, slot_count: int) -> None:
        """Nothing has been told yet."""
        self._tables: list[NDArray[np.int32]] = []  # by layer group [slots, W]
        self._slot_count = slot_count

    def write(self, order: Order) -> bytes:
        """The message of an order."""
        parts = [np.array([order.number, order.kind], "<i8").tobytes()]
        if order.batch is not None:
            parts += self._write_batch(order.batch)
        elif order.sources is not None and order.destinations is not None:
            parts.append(np.stack((order.sources, order.destinations)).astype("<i8").tobytes())
        return b"".join(parts)

    def read(self, message: bytes) -> Order:
        """The order of a message."""
        reader = _Reader(message)
        number, kind = reader.take(2).tolist()
        if kind == Kind.STEP:
            return Order(number, Kind.STEP, batch=self._read_batch(reader))
        if kind == Kind.COPY:
            sources, destinations = reader.rest().reshape(2, -1)
            return Order(number, Kind.COPY, sources=sources, destinations=destinations)
        return Order(number, Kind(kind))

    def _write_batch(self, batch: StepBatch) -> Iterator[bytes]:
        changes = [self._changes(group, batch.slots, table) for group, table in enumerate(batch.block_tables)]
        counts = [len(batch.slots), len(batch.token_ids), len(batch.sampling), len(changes)]
        for table, (places, _) in zip(batch.block_tables, changes, strict=True):
            counts += [table.shape[1], len(places)]
        yield np.array(counts, "<i8").tobytes()
        for array in (batch.slots, batch.token_ids, batch.query_lengths, batch.context_lengths):
            yield array.astype("<i8").tobytes()
        for field in _sampling_fields():
            yield getattr(batch.sampling, field).astype(_SAMPLING_TYPES.get(field, "<i8")).tobytes()
        for places, entries in changes:
            yield places.astype("<i4").tobytes()
            yield entries.astype("<i4").tobytes()

    def _read_batch(self, reader: _Reader) -> StepBatch:
        row_count, token_count, sampling_count, group_count = reader.take(4).tolist()
        shapes = reader.take(2 * group_count).reshape(-1, 2).tolist()
        slots, token_ids = reader.take(row_count), reader.take(token_count)
        query_lengths, context_lengths = reader.take(row_count), reader.take(row_count)
        sampling = {
            field: reader.take(sampling_count, _SAMPLING_TYPES.get(field, "<i8")) for field in _sampling_fields()
        }
        tables = []
        for group, (width, change_count) in enumerate(shapes):
            places, entries = reader.take(change_count, "<i4"), reader.take(change_count, "<i4")
            known = self._known(group, width)
            table = np.ascontiguousarray(known[slots, :width])
            table.reshape(-1)[places] = entries
            known[slots, :width] = table
            tables.append(table)
        return StepBatch(slots, token_ids, query_lengths, context_lengths, tuple(tables), SamplingBatch(**sampling))

    def _changes(
        self, group: int, slots: IntArray, table: NDArray[np.int32]
    ) -> tuple[NDArray[np.intp], NDArray[np.int32]]:
        """Where in a table there is something new, counted row by row, and what."""
        known = self._known(group, table.shape[1])
        places = np.flatnonzero(known[slots, : table.shape[1]] != table)
        known[slots, : table.shape[1]] = table
        return places, table.reshape(-1)[places]

    def _known(self, group: int, width: int) -> NDArray[np.int32]:
        """The tables of a group as they were told last, with room for `width` entries in each row."""
        while len(self._tables) <= group:
            self._tables.append(np.zeros((self._slot_count, 0), dtype=np.int32))
        missing = width - self._tables[group].shape[1]
        if missing > 0:
            self._tables[group] = np.pad(self._tables[group], ((0, 0), (0, missing)))
        return self._tables[group]


class _Reader:
    """Takes arrays from a message, one after the other; they may be written to."""

    def __init__(self, message: bytes) -> None:
        self._bytes = bytearray(message)
        self._next = 0

    def take(self, count: int, kind: DTypeLike = "<i8") -> NDArray:
        array = np.frombuffer(self._bytes, kind, count, self._next)
        self._next += array.nbytes
        return array

    def rest(self) -> NDArray:
        return np.frombuffer(self._bytes, "<i8", -1, self._next)


def _sampling_fields() -> list[str]:
    """The fields of a sampling batch, those of eight bytes first: so each array begins where its numbers may."""
    names = [field.name for field in fields(SamplingBatch)]
    return sorted(names, key=lambda name: np.dtype(_SAMPLING_TYPES.get(name, "<i8")).itemsize, reverse=True)


def write_answer(number: int, error: Exception | None) -> bytes:
    """What a rank says when it has done what order `number` asked for, or has failed to."""
    return _ANSWER.pack(number) + describe(error).encode()


def read_answer(answer: bytes) -> tuple[int, str]:
    """The number of the order, and how it failed; empty where it did not."""
    return _ANSWER.unpack_from(answer)[0], answer[_ANSWER.size :].decode()


def describe(error: Exception | None) -> str:
    """An error in one line, its kind before the first colon; empty where there is none."""
    if error is None:
        return ""
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"


def kind_of(description: str) -> str:
    """What kind of error it was: ranks that fail alike fail in one kind, on devices of different names."""
    return description.partition(":")[0]
