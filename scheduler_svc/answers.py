"""Answers: what requests produce, who reads them, and how long they are kept."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import grpc

from common.errors import RefusedError, invalid
from scheduler_svc.core.request import FinishReason, Request
from scheduler_svc.output_stream import OutputStream
from scheduler_svc.text_stream import TextStream


@dataclass(frozen=True, slots=True)
class Terms:
    """What a request was accepted under, beside what the core has to know."""

    content_hash: bytes = b""  # of what the user sent, but for the id and where to go on
    stops: tuple[str, ...] = ()
    detach_timeout_s: int = 0  # how long it runs on while nobody reads it
    is_named: bool = False  # whether the user chose the id, and so can come back
    operation: str = "text_completion"  # as traces name it: that, or `chat`
    method: str = "Generate"  # the call that it came with
    prompt_json: str = ""  # what was asked, where traces may tell it


@dataclass(frozen=True, slots=True)
class Piece:
    """What one reading of a choice brings: everything since the reading before."""

    text: str
    token_ids: Sequence[int]
    output_token_count: int  # read of this choice, up to and including this piece
    text_length: int  # code points, the same
    finish_reason: FinishReason | None  # set on the last piece


class Answer:
    """What a request produces, all of its choices."""

    def __init__(
        self,
        request: Request,
        texts: Sequence[TextStream],
        terms: Terms,
        accepted_at: float,
        received_at: float | None = None,
    ) -> None:
        """Start empty; `texts` are those of the choices; without `received_at` it was accepted at once."""
        self.request = request
        self.terms = terms
        self.accepted_at = accepted_at
        self.received_at = accepted_at if received_at is None else received_at  # since when its user waits
        self.held_for: tuple[str, ...] = ()  # what it was held at the door for
        self.is_abandoned = False  # nobody came back for it
        self.number = 0  # in the journal; 0: not there
        self.known_end: float | None = None  # when it ended, in an earlier life of the scheduler
        self.readers: set[Reader] = set()
        self.streams = [
            OutputStream(choice, text, self._note_news) for choice, text in zip(request.family, texts, strict=True)
        ]

    @property
    def has_ended(self) -> bool:
        """Whether nothing comes any more."""
        return all(stream.finish_reason is not None for stream in self.streams)

    @property
    def output_token_count(self) -> int:
        """Tokens of all choices."""
        return sum(len(stream.token_ids) for stream in self.streams)

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

    def _note_news(self, stream: OutputStream) -> None:
        for reader in self.readers:
            reader.note_news(stream)


class Reader:
    """Reads an answer piece by piece: one token at a time where it keeps up, more where it does not."""

    def __init__(self, answer: Answer, positions: Mapping[int, tuple[int, int]]) -> None:
        """Start where the reader is: (tokens, code points) that it has, by choice. Raises `RefusedError`."""
        self.answer = answer
        self._positions = [positions.get(choice, (0, 0)) for choice in range(len(answer.streams))]
        self._news: dict[OutputStream, None] = {}  # streams with something to read, the longest waiting first
        self._open_count = len(answer.streams)  # streams whose last piece was not read
        self._wake = asyncio.Event()
        self._interruption: RefusedError | None = None
        for stream, (token_count, text_length) in zip(answer.streams, self._positions, strict=True):
            if token_count > len(stream.token_ids) or (text_length and text_length > len(stream.text)):
                raise data_loss(
                    answer.request.request_id,
                    f"choice {stream.request.choice} has {len(stream.token_ids)} tokens and {len(stream.text)} "
                    f"characters here, resume_from names {token_count} and {text_length}",
                )
            if token_count < len(stream.token_ids) or stream.finish_reason is not None:
                self._news[stream] = None

    @property
    def is_over(self) -> bool:
        """Whether the last piece of every choice was read."""
        return not self._open_count

    async def next(self) -> tuple[OutputStream, Piece]:
        """Wait until there is something of any choice, then take it. Not to be called when it `is_over`.

        Raises `RefusedError` when the answer goes on without this reader.
        """
        while not self._news:
            if self._interruption is not None:
                raise self._interruption
            self._wake.clear()
            await self._wake.wait()
        return self._take()

    def rest(self) -> Iterator[tuple[OutputStream, Piece]]:
        """Take what there is, without waiting for more."""
        while self._news:
            yield self._take()

    def interrupt(self, reason: RefusedError) -> None:
        """Stop this reader, once it has read what is there."""
        self._interruption = reason
        self._wake.set()

    def note_news(self, stream: OutputStream) -> None:
        """There is something to read."""
        self._news[stream] = None
        self._wake.set()

    def _take(self) -> tuple[OutputStream, Piece]:
        stream = next(iter(self._news))
        del self._news[stream]
        choice = stream.request.choice
        token_count, text_length = self._positions[choice]
        text = stream.text
        self._positions[choice] = (len(stream.token_ids), len(text))
        self._open_count -= stream.finish_reason is not None
        return stream, Piece(
            text[text_length:], stream.token_ids[token_count:], *self._positions[choice], stream.finish_reason
        )


class AnswerBook:
    """Every request that runs, and for a while every one that has ended, by id."""

    def __init__(
        self, keep_s: float, on_abandoned: Callable[[Request], None], on_forgotten: Callable[[Answer], None]
    ) -> None:
        """Keep answers for `keep_s` after their end. `on_abandoned` is called for a running request that nobody has
        read for its `detach_timeout_s`, `on_forgotten` when an answer that had ended is let go.
        """
        self._keep_s = keep_s
        self._on_abandoned = on_abandoned
        self._on_forgotten = on_forgotten
        self._answers: dict[str, Answer] = {}
        self._ended: dict[Answer, asyncio.TimerHandle] = {}  # each until it is let go, the next one first
        self._detached: dict[Answer, asyncio.TimerHandle] = {}  # running and not read, each with its last moment
        self._loop = asyncio.get_running_loop()

    def find(self, request_id: str, content_hash: bytes) -> Answer | None:
        """The answer to this very request. Raises `RefusedError` where the id belongs to another one."""
        answer = self._answers.get(request_id)
        if answer is not None and answer.terms.content_hash != content_hash:
            state = "has ended and is kept" if answer.has_ended else "is running"
            raise RefusedError(
                grpc.StatusCode.ALREADY_EXISTS,
                f"another request with the id '{request_id}' {state}; choose another request_id",
            )
        return answer

    def add(self, answer: Answer) -> None:
        """Take up an answer that nobody reads yet."""
        self._answers[answer.request.request_id] = answer

    def read(self, answer: Answer, positions: Mapping[int, tuple[int, int]]) -> Reader:
        """Start to read. Raises `RefusedError` when there is less than the reader has."""
        if positions and max(positions) >= len(answer.streams):
            raise invalid(f"resume_from names choice {max(positions)}, the request has {len(answer.streams)}")
        reader = Reader(answer, positions)
        answer.readers.add(reader)
        if (timer := self._detached.pop(answer, None)) is not None:
            timer.cancel()
        return reader

    def leave(self, reader: Reader) -> None:
        """A reader is gone, whether it has read everything or not."""
        answer = reader.answer
        answer.readers.discard(reader)
        if not answer.readers:
            if answer.has_ended:
                self._keep(answer)
            else:
                self.note_unread(answer)

    def note_unread(self, answer: Answer) -> None:
        """Nobody reads a running answer: it is abandoned after its detach time-out, or at once."""
        timeout_s = answer.terms.detach_timeout_s
        if timeout_s:
            self._detached[answer] = self._loop.call_later(timeout_s, self._abandon, answer)
        else:
            self._on_abandoned(answer.request)

    def note_ended(self, answer: Answer, ended_s_ago: float = 0.0) -> None:
        """Nothing comes any more: keep the answer for a while, and as long as somebody reads it."""
        if (timer := self._detached.pop(answer, None)) is not None:
            timer.cancel()
        if not answer.readers:
            self._keep(answer, ended_s_ago)

    def _keep(self, answer: Answer, ended_s_ago: float = 0.0) -> None:
        is_kept = answer.terms.is_named and not answer.is_abandoned  # who comes too late may begin anew under its id
        keep_s = self._keep_s - ended_s_ago if is_kept else 0.0
        if keep_s > 0:
            if (timer := self._ended.pop(answer, None)) is not None:
                timer.cancel()
            self._ended[answer] = self._loop.call_later(keep_s, self._let_go, answer)
        else:
            self._forget(answer)

    def _let_go(self, answer: Answer) -> None:
        if not answer.readers:
            self._forget(answer)

    def _forget(self, answer: Answer) -> None:
        timer = self._ended.pop(answer, None)
        if timer is not None:
            timer.cancel()
        if self._answers.get(answer.request.request_id) is answer:
            del self._answers[answer.request.request_id]
            self._on_forgotten(answer)

    def forget_oldest(self) -> bool:
        """Let go of the answer that ended first and is not read; False when there is none."""
        oldest = next((answer for answer in self._ended if not answer.readers), None)
        if oldest is None:
            return False
        self._forget(oldest)
        return True

    def interrupt(self, reason: RefusedError) -> None:
        """Stop everybody who reads an answer that has not ended."""
        for answer in self._answers.values():
            if not answer.has_ended:
                for reader in answer.readers:
                    reader.interrupt(reason)

    def _abandon(self, answer: Answer) -> None:
        del self._detached[answer]
        answer.is_abandoned = True
        self._on_abandoned(answer.request)

    def close(self) -> None:
        """Stop all timers."""
        for timer in (*self._detached.values(), *self._ended.values()):
            timer.cancel()

    def get(self, request_id: str) -> Answer | None:
        """The answer to a request, if it is kept."""
        return self._answers.get(request_id)

    def __getitem__(self, request_id: str) -> Answer:
        """The answer of that id."""
        return self._answers[request_id]

    def __iter__(self) -> Iterator[Answer]:
        return iter(self._answers.values())


def data_loss(request_id: str, reason: str) -> RefusedError:
    """The status of an answer that cannot go on where its reader is."""
    return RefusedError(
        grpc.StatusCode.DATA_LOSS,
        f"the answer to request '{request_id}' cannot be continued: {reason}; send it again from the start, under "
        f"another id",
    )
