"""What one choice of a request has produced, for as many readers as there are."""

from __future__ import annotations

from array import array
from collections.abc import Callable

from scheduler_svc.core.request import FinishReason, Request
from scheduler_svc.text_stream import TextStream


class OutputStream:
    """The output of one choice, from the step loop to its readers.

    All of it is kept, so that a reader may come, go and come back at any place. Text is made when it is read, except
    where stop strings have to be found as soon as they are complete. The step loop never waits for a reader.
    """

    on_first_token: Callable[[float], None] | None = None  # is told when that was

    def __init__(self, request: Request, text: TextStream, on_news: Callable[[OutputStream], None]) -> None:
        """Start empty; `on_news` is called whenever there is something new to read."""
        self.request = request
        self.token_ids: array[int] = array("I")
        self.finish_reason: FinishReason | None = None  # set once nothing comes any more
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self.ended_at: float | None = None
        self._text_stream = text
        self._text = ""  # made
        self._text_token_count = 0  # how many of token_ids it was made from
        self._text_is_whole = False  # nothing is held back any more
        self._on_news = on_news

    def push(self, token_id: int, now: float) -> int | None:
        """Add a token. Returns the output count at which the text came to a stop string, if it has."""
        if self.first_token_at is None:
            self.first_token_at = now
            if self.on_first_token is not None:
                self.on_first_token(now)
        self.last_token_at = now
        self.token_ids.append(token_id)
        self._on_news(self)
        return self._make_text() if self._text_stream.has_stops else None

    def end(self, reason: FinishReason, now: float) -> None:
        """Nothing comes any more."""
        self.finish_reason = reason
        self.ended_at = now
        self._on_news(self)

    @property
    def text(self) -> str:
        """All text that is certain by now."""
        self._make_text()
        if self.finish_reason is not None and not self._text_is_whole:
            self._text_is_whole = True
            self._text += self._text_stream.finish()
        return self._text

    def _make_text(self) -> int | None:
        fresh = self.token_ids[self._text_token_count :]
        if not fresh:
            return None
        self._text_token_count += len(fresh)
        piece = self._text_stream.push(fresh)
        self._text += piece.text
        return piece.stopped_at
