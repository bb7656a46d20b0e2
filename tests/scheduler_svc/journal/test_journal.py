"""Write, then release, then acknowledge: what waits for the journal, in which order, and for how long."""

import asyncio
import threading

from structlog.testing import capture_logs

from scheduler_svc.journal.journal import Durability, Journal
from scheduler_svc.journal.records import Joined, Outputs
from scheduler_svc.journal.restored import Restored
from scheduler_svc.journal.store import Store
from tests.scheduler_svc.journal.samples import MIB, Model, accepted, durable, opened, output_of, stepped


class GatedStore(Store):
    """A store whose disk is as slow as a test wants it to be."""

    def __init__(self, *args):
        self.gate = threading.Event()
        self.batches = []  # of every transaction, committed or running
        super().__init__(*args)

    def write(self, records):
        self.batches.append(list(records))
        assert self.gate.wait(10)
        super().write(records)


def gated(path):
    store = GatedStore.open(path, MIB)
    return store, Journal(store, MIB, 4096, 0.05)


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def test_what_was_released_is_in_the_file(tmp_path):
    """This is the promise: no user has seen a token that a restart does not know."""
    async with opened(tmp_path / "journal.db") as journal:
        journal.append(accepted(1))
        for step in range(50):
            journal.append(stepped(step, {1: step}))
            await durable(journal)
            assert output_of(Store.read(tmp_path / "journal.db"), 1) == list(range(step + 1))


async def test_a_restarted_journal_goes_on_where_it_stopped(tmp_path):
    """Numbers that were used again would mix up two requests."""
    path = tmp_path / "journal.db"
    async with opened(path) as journal:
        numbers = [journal.next_number(), journal.next_key(), journal.next_key()]
        journal.append(accepted(1, keys=(1, 2)))
        journal.append(stepped(1, {1: 7}))
        first = journal.next_epoch(100)
    async with opened(path) as journal:
        assert output_of(journal.restored, 1) == [7]
        assert [journal.next_number(), journal.next_key(), journal.next_key()] == [2, 3, 4]
        assert journal.next_epoch(50) == first + 1 == 101
        assert journal.byte_count > 0

    assert numbers == [1, 1, 2]


async def test_what_comes_during_a_commit_is_the_next_commit(tmp_path):
    """A slow disk makes transactions larger, not the queue longer."""
    store, journal = gated(tmp_path / "journal.db")
    journal.append(accepted(1))
    journal.append(stepped(0, {1: 0}))
    await until(lambda: store.batches)
    for step in range(1, 6):
        journal.append(stepped(step, {1: step}))
        await asyncio.sleep(0.001)
    store.gate.set()
    await journal.close()

    assert [len(batch) for batch in store.batches] == [2, 5]


async def test_the_loop_does_not_wait_for_the_disk(tmp_path):
    """While a disk takes its time, plans go out and other users are served."""
    store, journal = gated(tmp_path / "journal.db")
    released = []
    journal.append(accepted(1))
    journal.then(lambda: released.append("token"))
    for _ in range(20):
        await asyncio.sleep(0.001)
    before = list(released)
    store.gate.set()
    await journal.close()

    assert before == []
    assert released == ["token"]


async def test_callbacks_run_in_order_each_after_all_before_it(tmp_path):
    """A user's second token never overtakes the first, nor an end the last token, nor an acknowledgement a release."""
    store, journal = gated(tmp_path / "journal.db")
    order = []
    journal.then(lambda: order.append("nothing to wait for"))
    assert order == ["nothing to wait for"]
    journal.append(accepted(1))
    journal.then(lambda: (order.append("first"), journal.then(lambda: order.append("from the first"))))
    journal.then(lambda: order.append("second"))
    await until(lambda: store.batches)
    journal.then(lambda: order.append("nothing new in between"))
    journal.append(stepped(1, {1: 1}))
    journal.then(lambda: order.append("next transaction"))
    assert order == ["nothing to wait for"]
    store.gate.set()
    await journal.close()

    assert order[1:] == ["first", "second", "nothing new in between", "next transaction", "from the first"]


async def test_a_callback_of_a_callback_is_not_nested(tmp_path):
    """A release that ends a request must be over before the next one begins."""
    async with opened(tmp_path / "journal.db") as journal:
        order = []
        journal.then(lambda: (journal.then(lambda: order.append("inner")), order.append("outer")))

        assert order == ["outer", "inner"]


async def test_a_callback_that_fails_takes_nobody_with_it(tmp_path):
    """One user's broken stream must not keep the tokens of all others."""
    order = []
    async with opened(tmp_path / "journal.db") as journal:
        with capture_logs() as logs:
            journal.append(accepted(1))
            journal.then(lambda: 1 / 0)
            journal.then(lambda: order.append("next"))
            await durable(journal)

    assert order == ["next"]
    assert [entry["event"] for entry in logs] == ["a callback of the journal failed"]


async def test_closing_writes_and_releases_what_is_left(tmp_path):
    """A scheduler that drains loses nothing, and whoever follows gets the file at once."""
    path = tmp_path / "journal.db"
    journal = Journal.open(path, MIB)
    released = []
    journal.append(accepted(1))
    journal.then(lambda: (journal.append(accepted(2)), journal.then(lambda: released.append(2))))
    await journal.close()
    await journal.close()
    journal.append(accepted(3))
    journal.then(lambda: released.append(3))

    assert released == [2, 3]
    assert journal.durability is Durability.OFF
    async with opened(path) as journal:
        assert [request.number for request in journal.restored.requests] == [1, 2]
    assert not [thread for thread in threading.enumerate() if thread.name == "journal"]


async def test_without_a_journal_nobody_waits():
    """A scheduler of which nothing is asked to survive pays nothing for it."""
    journal = Journal.off()
    order = []
    journal.append(accepted(1))
    journal.then(lambda: order.append("released"))

    assert order == ["released"]
    assert journal.durability is Durability.OFF
    assert journal.restored == Restored()
    assert [journal.next_number(), journal.next_number(), journal.next_key()] == [1, 2, 1]
    assert journal.next_epoch(123) == 123
    assert journal.byte_count == 0
    await journal.close()


async def test_a_checkpoint_moves_tokens_from_steps_to_outputs(tmp_path):
    """Steps are written every few milliseconds; without this the file, and a restart, would grow with the uptime."""
    model = Model()
    async with opened(tmp_path / "journal.db", checkpoint_steps=10) as journal:
        journal.outputs = model.live_outputs
        for record in [accepted(1), *(stepped(step, {1: step}) for step in range(25))]:
            model.apply(record)
            journal.append(record)
            await durable(journal)
        restored = Store.read(tmp_path / "journal.db")

    assert output_of(restored, 1) == list(range(25))
    assert restored.step_count == 5


async def test_steps_of_an_earlier_life_count_towards_the_next_checkpoint(tmp_path):
    """A scheduler that is killed again and again must not pile up steps."""
    path = tmp_path / "journal.db"
    for life in range(5):
        async with opened(path, checkpoint_steps=10) as journal:
            journal.outputs = lambda: Outputs({})
            if life == 0:
                journal.append(Joined("executor", b""))
            for step in range(6):
                journal.append(stepped(step, {}))
                await durable(journal)
            assert Store.read(path).step_count <= 10


async def test_a_checkpoint_that_the_owner_cannot_give_loses_nothing(tmp_path):
    """A bug in a hook must not turn into lost tokens, or into users who wait for ever."""
    async with opened(tmp_path / "journal.db", checkpoint_steps=2) as journal:
        journal.outputs = lambda: 1 / 0
        with capture_logs() as logs:
            journal.append(accepted(1))
            for step in range(5):
                journal.append(stepped(step, {1: step}))
                await durable(journal)
        restored = Store.read(tmp_path / "journal.db")

    assert output_of(restored, 1) == list(range(5))
    assert {entry["event"] for entry in logs} == {"a hook of the journal failed"}


async def test_the_files_stay_small_over_fifty_thousand_steps(tmp_path):
    """A scheduler runs for months: what it takes on the disk depends on what is live, not on how long."""
    model = Model()
    sizes = []
    async with opened(tmp_path / "journal.db", 2 * MIB, checkpoint_steps=1000) as journal:
        journal.outputs = model.live_outputs
        for number in range(1, 5):
            model.apply(accepted(number))
            journal.append(accepted(number))
        for step in range(50_000):
            record = stepped(step, dict.fromkeys(range(1, 5), step))
            model.outputs = {key: ids[-50:] for key, ids in model.outputs.items()}
            model.apply(record)
            journal.append(record)
            if step % 100 == 99:
                await durable(journal)
                sizes.append(journal.byte_count)
        assert journal.durability is Durability.ON

    assert max(sizes[250:]) <= max(sizes[:250]) < MIB
