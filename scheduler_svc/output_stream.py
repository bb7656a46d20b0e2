"""What a request has produced and its reader has not taken yet."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from scheduler_svc.core.request import FinishReason, Request
from scheduler_svc.text_stream import TextStream


@dataclass(frozen=True, slots=True)
class Piece:
    """What one reading of a stream brings: everything since the reading before."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None  # set on the last piece


class OutputStream:
    """The output of one request, from the step loop to its reader.

    A reader that keeps up takes one token at a time; a slow one finds more. The step loop never waits for a reader.
    Text is made when it is read, except where stop strings have to be found as soon as they are complete.
    """

    def __init__(self, request: Request, text: TextStream, accepted_at: float) -> None:
        """Start empty."""
        self.request = request
        self.accepted_at = accepted_at
        self.first_token_at: float | None = None
        self.ended_at: float | None = None
        self.output_token_count = 0  # taken by the reader
        self.text_length = 0  # code points taken by the reader
        self._text_stream = text
        self._text = ""  # made and not taken
        self._token_ids: list[int] = []  # not taken
        self._text_token_count = 0  # how many of _token_ids are in _text
        self._finish_reason: FinishReason | None = None
        self._wake = asyncio.Event()

    def push(self, token_id: int, now: float) -> int | None:
        """Add a token. Returns the output count at which the text came to a stop string, if it has."""
        if self.first_token_at is None:
            self.first_token_at = now
        self._token_ids.append(token_id)
        self._wake.set()
        if not self._text_stream.has_stops:
            return None
        piece = self._text_stream.push([token_id])
        self._text += piece.text
        self._text_token_count += 1
        return piece.stopped_at

    def end(self, reason: FinishReason, now: float) -> None:
        """Nothing comes any more."""
        self._finish_reason = reason
        self.ended_at = now
        self._wake.set()

    async def next(self) -> Piece:
        """Wait until there is something, then take all of it. Not to be called again after the last piece."""
        await self._wake.wait()
        self._wake.clear()
        token_ids, self._token_ids = self._token_ids, []
        fresh = token_ids[self._text_token_count :]
        text, self._text = self._text, ""
        self._text_token_count = 0
        if fresh:
            text += self._text_stream.push(fresh).text
        if self._finish_reason is not None:
            text += self._text_stream.finish()
        self.output_token_count += len(token_ids)
        self.text_length += len(text)
        return Piece(text, token_ids, self._finish_reason)
