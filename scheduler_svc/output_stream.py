"""What a request has produced and its reader has not taken yet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
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
    """The output of one choice of a request, from the step loop to its reader.

    A reader that keeps up takes one token at a time; a slow one finds more. The step loop never waits for a reader.
    Text is made when it is read, except where stop strings have to be found as soon as they are complete.
    """

    def __init__(self, request: Request, text: TextStream, on_news: Callable[[OutputStream], None]) -> None:
        """Start empty; `on_news` is called whenever there is something to take."""
        self.request = request
        self.first_token_at: float | None = None
        self.ended_at: float | None = None
        self.output_token_count = 0  # taken by the reader
        self.text_length = 0  # code points taken by the reader
        self._text_stream = text
        self._text = ""  # made and not taken
        self._token_ids: list[int] = []  # not taken
        self._text_token_count = 0  # how many of _token_ids are in _text
        self._finish_reason: FinishReason | None = None
        self._on_news = on_news

    def push(self, token_id: int, now: float) -> int | None:
        """Add a token. Returns the output count at which the text came to a stop string, if it has."""
        if self.first_token_at is None:
            self.first_token_at = now
        self._token_ids.append(token_id)
        self._on_news(self)
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
        self._on_news(self)

    def take(self) -> Piece:
        """Take all there is. Not to be called again after the last piece."""
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


class Answer:
    """What a request produces, all of its choices, on the way to one reader."""

    def __init__(self, request: Request, texts: Sequence[TextStream], accepted_at: float) -> None:
        """Start empty; `texts` are those of the choices."""
        self.request = request
        self.accepted_at = accepted_at
        self.streams = [
            OutputStream(choice, text, self._note_news) for choice, text in zip(request.family, texts, strict=True)
        ]
        self._news: dict[OutputStream, None] = {}  # streams with something to take, the longest waiting first
        self._open_count = len(self.streams)  # streams whose last piece was not taken
        self._wake = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Whether the last piece of every choice was taken."""
        return not self._open_count

    @property
    def output_token_count(self) -> int:
        """Tokens that the reader has taken."""
        return sum(stream.output_token_count for stream in self.streams)

    @property
    def first_token_at(self) -> float | None:
        """When the first token of any choice was known."""
        return min(
            (stream.first_token_at for stream in self.streams if stream.first_token_at is not None), default=None
        )

    @property
    def ended_at(self) -> float | None:
        """When the last of those choices ended that have."""
        return max((stream.ended_at for stream in self.streams if stream.ended_at is not None), default=None)

    async def next(self) -> tuple[OutputStream, Piece]:
        """Wait until there is something of any choice, then take it. Not to be called when it `is_over`."""
        while not self._news:
            self._wake.clear()
            await self._wake.wait()
        return self._take()

    def rest(self) -> Iterator[tuple[OutputStream, Piece]]:
        """Take what there is, without waiting for more."""
        while self._news:
            yield self._take()

    def _take(self) -> tuple[OutputStream, Piece]:
        stream = next(iter(self._news))
        del self._news[stream]
        piece = stream.take()
        self._open_count -= piece.finish_reason is not None
        return stream, piece

    def _note_news(self, stream: OutputStream) -> None:
        self._news[stream] = None
        self._wake.set()
