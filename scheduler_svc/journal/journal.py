"""Write, then release, then acknowledge: records go to a thread; what waits for them runs once they are committed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from enum import Enum
from functools import partial
from itertools import count
from typing import TypeVar

import structlog

from scheduler_svc.journal.errors import FullError, JournalError
from scheduler_svc.journal.journal_thread import JournalThread
from scheduler_svc.journal.records import Forgotten, Outputs, Record, Stepped
from scheduler_svc.journal.release_queue import ReleaseQueue
from scheduler_svc.journal.restored import Restored
from scheduler_svc.journal.store import Store

log = structlog.get_logger()

T = TypeVar("T")

DEFAULT_BYTES = 1024**3
CHECKPOINT_STEPS = 4096
RETRY_S = 5.0
SHED_LIMIT = 10
"""How often a transaction that does not fit is tried again with fewer results kept, before the journal is given up."""

_STEP_SHARE = 8  # a checkpoint comes early when steps take more than one part in this many of `max_bytes`
_TOKEN_BYTES = 16  # what a token of a step takes: its key and its id as text


class Durability(Enum):
    """What a crash of this process would cost."""

    OFF = "off"  # everything: no journal is kept
    ON = "on"  # nothing that was released
    LOST = "lost"  # what happened since: the file cannot be written. It is tried again every few seconds.


class Journal:
    """Takes records, and calls back when they are durable. Lives on one event loop, which it never blocks.

    What is appended while a transaction runs is the next transaction. When one fails the journal is LOST: all that
    waits is called at once and nothing is kept, until `snapshot()` could be written. A disk that neither writes nor
    fails is waited for.

    The owner sets the hooks before it appends anything. They are called on the loop, never inside `append` or `then`.
    """

    def __init__(self, store: Store | None, max_bytes: int, checkpoint_steps: int, retry_s: float) -> None:
        """See `open` and `off`."""
        self.restored = Restored() if store is None else store.load()
        self.durability = Durability.OFF if store is None else Durability.ON

        # All records that make what lives and is kept now, from nothing.
        self.snapshot: Callable[[], list[Record]] = list
        # The tokens so far of every choice that has not ended, restored ones too; None when that cannot be said yet.
        self.outputs: Callable[[], Outputs | None] = lambda: None
        # The journal is full: append `Forgotten` for the oldest results, and say whether there were any.
        self.shed: Callable[[], bool] = lambda: False
        # `durability` has changed.
        self.on_change: Callable[[], None] = lambda: None

        self._store = store
        self._loop = asyncio.get_running_loop()
        self._thread = None if store is None else JournalThread(self._loop)
        self._checkpoint_steps = checkpoint_steps
        self._checkpoint_tokens = max_bytes // _STEP_SHARE // _TOKEN_BYTES
        self._retry_s = retry_s
        self._retry: asyncio.TimerHandle | None = None
        self._numbers = count(self.restored.next_number)
        self._keys = count(self.restored.next_key)
        self._epoch = self.restored.epoch

        self._pending: list[Record] = []  # appended since the last hand-over
        self._handed_count = 0  # records before these, since the start
        self._released = ReleaseQueue()  # counts records in the same way
        self._keeps = store is not None  # appended records are kept: ON, or on the way back
        self._busy = False  # the thread works, or will at the end of this iteration of the loop
        self._idle = asyncio.Event()  # set while not busy
        self._step_count = self.restored.step_count  # since the last checkpoint, like the next
        self._token_count = 0
        self._shed_count = 0  # since the last transaction that succeeded
        self._reason = ""  # why it is LOST, as it was last logged

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        max_bytes: int = DEFAULT_BYTES,
        *,
        checkpoint_steps: int = CHECKPOINT_STEPS,
        retry_s: float = RETRY_S,
    ) -> Journal:
        """Open a journal, or make a new one, and read it. Raises `JournalError`."""
        store = Store.open(path, max_bytes)
        try:
            return cls(store, max_bytes, checkpoint_steps, retry_s)
        except BaseException:
            store.close()
            raise

    @classmethod
    def off(cls) -> Journal:
        """A journal that keeps nothing and never lets anybody wait."""
        return cls(None, max_bytes=0, checkpoint_steps=0, retry_s=0.0)

    # --- what the owner uses ------------------------------------------------------------------------------------

    def next_number(self) -> int:
        """A number for a request, never used before."""
        return next(self._numbers)

    def next_key(self) -> int:
        """A key for a choice, never used before."""
        return next(self._keys)

    def next_epoch(self, now_ms: int) -> int:
        """An epoch above all before it, `now_ms` or later. Waits for the disk: call it before there is traffic.

        OFF there is no memory of earlier ones: `now_ms` it is. Where it cannot be written the journal is LOST, and the
        epoch still above all that were.
        """
        if self._store is None:
            return now_ms
        if self.durability is Durability.ON:
            try:
                self._epoch = self._store.next_epoch(now_ms)
                return self._epoch
            except JournalError as error:
                self._lose(error)
        self._epoch = max(self._epoch + 1, now_ms)
        return self._epoch

    @property
    def byte_count(self) -> int:
        """What the files take on the disk."""
        return 0 if self._store is None else self._store.byte_count

    def append(self, record: Record) -> None:
        """Write `record` some time soon; what it holds must not be changed any more. Unless ON, forget it."""
        if not self._keeps:
            return
        self._pending.append(record)
        if isinstance(record, Stepped):
            self._step_count += 1
            self._token_count += len(record.keys)
        if not self._busy:
            self._begin()
            self._loop.call_soon(self._hand_over)

    def then(self, callback: Callable[[], None]) -> None:
        """Call `callback` once all that was appended before is durable, and after all callbacks before it.

        It runs inside this call when that is so already, and when the journal is not ON.
        """
        is_on = self.durability is Durability.ON
        self._released.add(self._handed_count + len(self._pending) if is_on else 0, callback)

    async def close(self) -> None:
        """Write what was appended, call who waits, and let another scheduler have the file. OFF from then on."""
        if self._thread is None or self._store is None:
            return
        while self._busy:
            await self._idle.wait()
        if self._retry is not None:
            self._retry.cancel()
        self._keeps = False
        self.durability = Durability.OFF
        thread, self._thread = self._thread, None
        closed: asyncio.Future[Exception | None] = self._loop.create_future()
        thread.submit(self._store.close, closed.set_result)
        await closed
        thread.stop()

    # --- transactions -------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._busy = True
        self._idle.clear()

    def _rest(self) -> None:
        self._busy = False
        self._idle.set()

    def _hand_over(self) -> None:
        """Give the thread all that was appended, as one transaction."""
        assert self._thread is not None
        assert self._store is not None
        if self._step_count >= self._checkpoint_steps or self._token_count > self._checkpoint_tokens:
            self._checkpoint()
        batch, self._pending = self._pending, []
        self._handed_count += len(batch)
        self._thread.submit(partial(self._store.write, batch), partial(self._written, batch))

    def _checkpoint(self) -> None:
        """Write each output as a whole. Only between two events are the owner's outputs those of its records."""
        self._step_count = self._token_count = 0
        if (outputs := self._ask(self.outputs)) is not None:
            self._pending.append(outputs)

    def _written(self, batch: list[Record], error: Exception | None) -> None:
        if error is None:
            durable_count = self._handed_count
            self._shed_count = 0
            self._go_on()
            self._released.reach(durable_count)
        elif isinstance(error, FullError) and self._made_room():
            # The room must be there before it is taken. To forget something twice does no harm.
            forgotten = [record for record in self._pending if isinstance(record, Forgotten)]
            self._pending = [*forgotten, *batch, *self._pending]
            self._hand_over()
        else:
            self._lose(error)

    def _go_on(self) -> None:
        if self._pending:
            self._hand_over()
        else:
            self._rest()

    def _made_room(self) -> bool:
        """Have results forgotten, each time twice as many: at most twice as many as needed, in few transactions."""
        made_room = False
        if self._shed_count < SHED_LIMIT:
            for _ in range(2**self._shed_count):
                if not self._ask(self.shed):
                    break
                made_room = True
            self._shed_count += 1
        return made_room

    # --- without the file ---------------------------------------------------------------------------------------

    def _lose(self, error: Exception) -> None:
        """Go on without the file: nobody waits for it any more."""
        log.error("the journal is lost; serving goes on without it", reason=str(error), exc_info=_unexpected(error))
        self._reason = str(error)
        self.durability = Durability.LOST
        self._drop_pending()
        self._released.reach(self._handed_count)
        self._ask(self.on_change)
        self._try_later()

    def _drop_pending(self) -> None:
        """Keep nothing from now on."""
        self._keeps = False
        self._handed_count += len(self._pending)
        self._pending = []
        self._rest()

    def _try_later(self) -> None:
        self._shed_count = 0
        self._retry = self._loop.call_later(self._retry_s, self._come_back)

    def _come_back(self) -> None:
        """Try to write all that there is now. What is appended meanwhile comes after it."""
        assert self._thread is not None
        assert self._store is not None
        records = self._ask(self.snapshot)
        if records is None:
            self._try_later()
            return
        self._begin()
        self._keeps = True
        self._step_count = self._token_count = 0
        self._thread.submit(partial(self._store.rewrite, records, self._epoch), self._came_back)

    def _came_back(self, error: Exception | None) -> None:
        if error is None:
            log.info("the journal is back")
            self._reason = ""
            self._shed_count = 0
            self.durability = Durability.ON
            self._go_on()
            self._ask(self.on_change)
            return
        self._drop_pending()
        if isinstance(error, FullError) and self._made_room():
            self._come_back()
            return
        if str(error) != self._reason:  # otherwise it is known, and said every few seconds it drowns everything else
            self._reason = str(error)
            log.warning("the journal does not come back", reason=self._reason, exc_info=_unexpected(error))
        self._try_later()

    def _ask(self, hook: Callable[[], T]) -> T | None:
        """Call one of the owner's hooks; None when it fails, so that nobody waits for ever."""
        try:
            return hook()
        except Exception:
            log.exception("a hook of the journal failed")
            return None


def _unexpected(error: Exception) -> Exception | None:
    """The error if it is a bug of ours, whose traceback is needed; others say all there is to know."""
    return None if isinstance(error, JournalError) else error
