"""A file that cannot be written: serving goes on, and the journal comes back."""

import asyncio
import sqlite3
import sys
from collections import deque

from structlog.testing import capture_logs

from scheduler_svc.journal.journal import Durability, Journal
from scheduler_svc.journal.records import Forgotten, RequestEnded
from scheduler_svc.journal.store import Store
from tests.scheduler_svc.journal.samples import MIB, Model, accepted, durable, opened, output_of, stepped
from tests.scheduler_svc.journal.test_journal import GatedStore, until

LIMIT = 256 * 1024
ON, LOST = Durability.ON, Durability.LOST


class Owner:
    """Keeps requests as a scheduler does, and can say at any time what they are."""

    def __init__(self, journal):
        self.journal = journal
        self.model = Model()
        self.ended = deque()  # numbers of the results that are kept, the oldest first
        self.states = []  # every durability, as it was told
        journal.snapshot = self.snapshot
        journal.outputs = self.model.live_outputs
        journal.on_change = lambda: self.states.append(journal.durability)

    def tell(self, record):
        self.model.apply(record)
        self.journal.append(record)

    def keep(self, number, prompt_count=1000):
        self.tell(accepted(number, prompt_count=prompt_count))
        self.tell(RequestEnded(number, 1.0))
        self.ended.append(number)

    def forget_oldest(self):
        if not self.ended:
            return False
        self.tell(Forgotten(self.ended.popleft()))
        return True

    def snapshot(self):
        ended = [RequestEnded(number, at) for number, at in self.model.ended_at.items()]
        return [*self.model.requests.values(), *ended, self.model.live_outputs()]


async def test_a_removed_file_costs_durability_until_it_is_made_again(tmp_path):
    """Somebody cleans up a disk: users notice nothing, operators are told, and minutes later all is as before."""
    path = tmp_path / "journal.db"
    order = []
    async with opened(path, MIB, retry_s=0.05) as journal:
        owner = Owner(journal)
        owner.tell(accepted(1))
        await durable(journal)
        path.unlink()
        with capture_logs() as logs:
            owner.tell(stepped(1, {1: 10}))
            journal.then(lambda: order.append((1, journal.durability)))
            journal.then(lambda: order.append((2, journal.durability)))
            await until(lambda: journal.durability is LOST)
            owner.tell(stepped(2, {1: 11}))
            journal.then(lambda: order.append((3, journal.durability)))
            await until(lambda: journal.durability is ON)
        owner.tell(stepped(3, {1: 12}))
        await durable(journal)

        assert output_of(Store.read(path), 1) == [10, 11, 12]
    assert order == [(1, LOST), (2, LOST), (3, LOST)]
    assert owner.states == [LOST, ON]
    assert [(entry["log_level"], entry["event"]) for entry in logs] == [
        ("error", "the journal is lost; serving goes on without it"),
        ("info", "the journal is back"),
    ]
    assert f"'{path}'" in logs[0]["reason"]


class FailingStore(GatedStore):
    """A store whose disk can be broken, and does not say how often it is tried."""

    def __init__(self, *args):
        self.broken = False
        self.rewrite_gate = None
        super().__init__(*args)
        self.gate.set()

    def write(self, records):
        super().write(records)
        if self.broken:
            raise sqlite3.OperationalError("disk I/O error")

    def rewrite(self, records, epoch):
        if self.broken:
            raise sqlite3.OperationalError("disk I/O error")
        if self.rewrite_gate is not None:
            assert self.rewrite_gate.wait(10)
        super().rewrite(records, epoch)


def failing(path):
    store = FailingStore.open(path, MIB)
    journal = Journal(store, MIB, 4096, 0.01)
    return store, journal, Owner(journal)


async def test_nobody_keeps_waiting_for_a_lost_journal(tmp_path):
    """Also those are released whose records were waiting for the transaction that failed."""
    store, journal, owner = failing(tmp_path / "journal.db")
    store.gate.clear()
    store.broken = True
    released = []
    owner.tell(accepted(1))
    journal.then(lambda: released.append(1))
    await until(lambda: store.batches)
    owner.tell(stepped(1, {1: 10}))
    journal.then(lambda: released.append(2))
    assert released == []
    store.gate.set()
    await until(lambda: journal.durability is LOST)
    await journal.close()

    assert released == [1, 2]


async def test_while_it_is_lost_nothing_piles_up(tmp_path):
    """A disk may stay full for days; the scheduler's memory must not follow."""
    store, journal, owner = failing(tmp_path / "journal.db")
    store.broken = True
    with capture_logs() as logs:
        owner.tell(accepted(1))
        await until(lambda: journal.durability is LOST)
        for step in range(200):
            owner.tell(stepped(step, {1: step}))
            await asyncio.sleep(0.001)
        assert len(journal._pending) == 0
        store.broken = False
        await until(lambda: journal.durability is ON)
    await journal.close()

    assert output_of(Store.read(tmp_path / "journal.db"), 1) == list(range(200))
    assert len(logs) == 2, "what is known is not logged every few seconds"


async def test_what_comes_while_it_returns_follows_the_snapshot(tmp_path):
    """Between the snapshot and its commit users go on; the first restart would show the gap."""
    store, journal, owner = failing(tmp_path / "journal.db")
    store.rewrite_gate = store.gate.__class__()
    store.broken = True
    owner.tell(accepted(1))
    await until(lambda: journal.durability is LOST)
    owner.tell(stepped(1, {1: 10}))
    store.broken = False
    await until(lambda: journal._keeps)  # the snapshot is being written
    released = []
    owner.tell(stepped(2, {1: 11}))
    journal.then(lambda: released.append(journal.durability))
    assert released == [LOST]
    store.rewrite_gate.set()
    await until(lambda: journal.durability is ON)
    owner.tell(stepped(3, {1: 12}))
    await journal.close()

    assert output_of(Store.read(tmp_path / "journal.db"), 1) == [10, 11, 12]


async def test_closing_a_lost_journal_ends_at_once(tmp_path):
    """A broken disk is no reason not to stop."""
    store, journal, owner = failing(tmp_path / "journal.db")
    store.broken = True
    owner.tell(accepted(1))
    await until(lambda: journal.durability is LOST)
    async with asyncio.timeout(5):
        await journal.close()
    await asyncio.sleep(0.05)

    assert owner.states == [LOST]
    assert journal.next_epoch(5) == 5
    assert journal.next_epoch(5) == 6


async def test_a_record_that_cannot_be_written_is_shown_as_the_bug_that_it_is(tmp_path):
    """A journal that dies silently would be found at the next crash."""
    async with opened(tmp_path / "journal.db", MIB, retry_s=0.05) as journal:
        with capture_logs() as logs:
            journal.append(accepted(1, keys=(2**70,)))
            await durable(journal)

        assert journal.durability is LOST
    assert isinstance(logs[0]["exc_info"], OverflowError)


async def test_a_full_journal_forgets_the_oldest_results(tmp_path):
    """Results are kept as long as there is room; what is live is never put at risk for what is over."""
    path = tmp_path / "journal.db"
    async with opened(path, LIMIT) as journal:
        owner = Owner(journal)
        journal.shed = owner.forget_oldest
        for number in range(1, 300):
            owner.keep(number)
            await durable(journal)
        owner.keep(300, prompt_count=20_000)
        await durable(journal)
        restored = Store.read(path)

    assert owner.states == []
    assert restored.requests == owner.model.restored_requests()
    assert restored.requests[-1].number == 300
    assert len(restored.requests) > 10
    assert path.stat().st_size <= LIMIT


async def test_a_full_journal_with_nothing_to_forget_is_lost_until_something_ends(tmp_path):
    """More is live than the limit allows: serving goes on, and durability returns when it is less."""
    path = tmp_path / "journal.db"
    async with opened(path, LIMIT, retry_s=0.02) as journal:
        owner = Owner(journal)
        journal.shed = owner.forget_oldest
        for number in range(1, 120):
            owner.tell(accepted(number, prompt_count=1000))
            await durable(journal)
        await until(lambda: journal.durability is LOST)
        for number in range(1, 100):
            owner.tell(Forgotten(number))
        await until(lambda: journal.durability is ON)
        restored = Store.read(path)

    assert owner.states == [LOST, ON]
    assert [request.number for request in restored.requests] == list(range(100, 120))


async def test_a_snapshot_that_is_too_large_is_shed_as_well(tmp_path):
    """Results that were kept while the journal was lost must not keep it lost."""
    path = tmp_path / "journal.db"
    async with opened(path, LIMIT, retry_s=0.02) as journal:
        owner = Owner(journal)
        journal.shed = owner.forget_oldest
        path.unlink()
        owner.keep(1)
        await until(lambda: journal.durability is LOST)
        for number in range(2, 90):
            owner.keep(number)
        await until(lambda: journal.durability is ON)

        assert Store.read(path).requests == owner.model.restored_requests()
    assert len(owner.ended) > 5


FULL_DISK = """
import asyncio, resource, sys
from scheduler_svc.journal.journal import Durability, Journal
from tests.scheduler_svc.journal.samples import MIB, accepted, durable
from tests.scheduler_svc.journal.test_losing import Owner

async def main():
    journal = Journal.open(sys.argv[1], 64 * MIB, retry_s=0.05)
    owner = Owner(journal)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    for number in range(1, 120):
        owner.tell(accepted(number, prompt_count=5000))
        await durable(journal)
    await asyncio.sleep(0.2)
    print(journal.durability.value)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    while journal.durability is Durability.LOST:
        await asyncio.sleep(0.01)
    print(journal.durability.value)
    await journal.close()

asyncio.run(main())
"""


async def test_a_file_that_the_system_does_not_let_grow_is_a_lost_journal_too(tmp_path):
    """A quota or a full disk, as the kernel says it: mid-transaction, with half of it written."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", FULL_DISK, str(tmp_path / "journal.db"), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    restored = Store.read(tmp_path / "journal.db")

    assert process.returncode == 0
    assert [line for line in output.decode().splitlines() if line in ("lost", "on")] == ["lost", "on"]
    assert [request.number for request in restored.requests] == list(range(1, 120))
