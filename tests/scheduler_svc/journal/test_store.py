"""The file of a journal: what goes in comes out, it stays within its bounds, and it is nobody else's."""

import contextlib
import os
import sqlite3
from array import array
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler_svc.journal.errors import FullError, JournalError
from scheduler_svc.journal.records import (
    ChoiceEnded,
    Forgotten,
    Joined,
    Left,
    Outputs,
    Placed,
    RequestEnded,
    Stepped,
)
from scheduler_svc.journal.restored import Restored
from scheduler_svc.journal.store import Store
from tests.scheduler_svc.journal.samples import MIB, Model, accepted, output_of, stepped

UNKNOWN_KEY = 10**6
REASONS = ["stop", "length", "cancelled"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.db"


@pytest.fixture
def store(path):
    with contextlib.closing(Store.open(path, 8 * MIB)) as store:
        yield store


def refusal_of(path, max_bytes=MIB):
    with pytest.raises(JournalError) as caught:
        Store.open(path, max_bytes)
    assert f"'{path}'" in str(caught.value)
    return str(caught.value)


# --- what goes in comes out ---------------------------------------------------------------------------------------


def test_everything_that_was_written_is_read_back(path):
    """A restarted scheduler knows only this: a field that is lost here is lost to a user."""
    records = [
        accepted(1, keys=(1, 2)),
        accepted(2, keys=(3,)),
        Placed(1, "executor é", 2**64 - 1, 1_700_000_000_000, 7, 2),
        stepped(1, {1: 10, 2: 20, 3: 2**32 - 1}),
        stepped(2, {1: 11, 2: 21}),
        ChoiceEnded(2, array("I", [20]), "error", "a row failed"),
        RequestEnded(2, 4000.25),
        Joined("executor é", b"\x00message"),
    ]
    model = Model()
    with contextlib.closing(Store.open(path, MIB)) as store:
        for record in records:
            model.apply(record)
        store.write(records)
    with contextlib.closing(Store.open(path, MIB)) as store:
        restored = store.load()

    assert restored.requests == model.restored_requests()
    assert restored.joined == [b"\x00message"]
    assert (restored.next_number, restored.next_key, restored.step_count) == (3, 4, 2)


def records_of(choices, model):
    """A sequence of records that makes sense, from whatever numbers hypothesis draws."""
    next_key = 1
    for number, (kind, pick, value) in enumerate(choices, start=1):
        keys = sorted(model.outputs)
        key = keys[pick % len(keys)] if keys else UNKNOWN_KEY
        live = sorted(model.outputs.keys() - model.ends.keys())
        numbers = sorted(model.requests)
        if kind == "accepted" or not keys:
            record = accepted(number, keys=range(next_key, next_key + 1 + pick % 3))
            next_key += 1 + pick % 3
        elif kind == "placed":
            record = Placed(key, f"executor {pick}", value, value // 2, pick, pick)
        elif kind == "stepped":
            record = stepped(number, dict.fromkeys([*live, UNKNOWN_KEY][pick % 2 :], value % 2**32))
        elif kind == "ended":
            record = ChoiceEnded(key, array("I", [pick] * (pick % 4)), REASONS[pick % 3], f"error {value}")
        elif kind == "request ended":
            record = RequestEnded(numbers[pick % len(numbers)], value / 3)
        elif kind == "forgotten":
            record = Forgotten(numbers[pick % len(numbers)])
        elif kind == "outputs":
            record = Outputs(model.live_outputs().outputs | {key: array("I", [9]) for key in model.ends})
        elif kind == "joined":
            record = Joined(f"executor {pick % 3}", bytes(pick))
        else:
            record = Left(f"executor {pick % 3}")
        model.apply(record)
        yield record


KINDS = ["accepted", "placed", "stepped", "ended", "request ended", "forgotten", "outputs", "joined", "left"]


def test_any_sequence_of_records_is_read_back_as_a_model_says(store):
    """Nobody thinks of every order in which things end, are placed, forgotten and checkpointed."""
    draws = st.tuples(st.sampled_from([*KINDS, "stepped", "stepped"]), st.integers(0, 20), st.integers(0, 2**64 - 1))

    @settings(max_examples=80, deadline=None)
    @given(st.lists(draws, max_size=40), st.integers(1, 10))
    def check(choices, batch_size):
        draws = [(kind, pick, value if kind == "placed" else value % 2**40) for kind, pick, value in choices]
        draws = [(kind, pick, min(value, 2**63 - 1)) for kind, pick, value in draws]
        model = Model()
        store.rewrite([], 0)
        records = list(records_of(draws, model))
        for begin in range(0, len(records), batch_size):
            store.write(records[begin : begin + batch_size])
        restored = store.load()

        assert restored.requests == model.restored_requests()
        assert restored.joined == [model.joined[name] for name in sorted(model.joined)]
        assert restored.next_key > max(model.outputs, default=0)

    check()


def test_a_batch_is_written_whole_or_not_at_all(store):
    """Half a transaction would release tokens of a request that nobody knows."""
    store.write([accepted(1)])
    with pytest.raises(sqlite3.IntegrityError):
        store.write([stepped(1, {1: 5}), accepted(2), accepted(1)])

    restored = store.load()
    assert [request.number for request in restored.requests] == [1]
    assert output_of(restored, 1) == []


def test_numbers_of_the_forgotten_are_not_given_out_again_while_steps_name_them(store):
    """A new choice under an old key would begin with somebody else's tokens."""
    store.write([accepted(1, keys=(1, 2)), stepped(1, {1: 5, 2: 6}), Forgotten(1)])
    assert store.load().next_key == 3

    store.write([Outputs({})])
    assert store.load().next_key == 1


def test_a_forgotten_request_leaves_nothing_behind(store, path):
    """Rows that nobody can see any more would fill the file, and keep what a user was promised is gone."""
    store.write([accepted(1, keys=(1, 2)), stepped(1, {1: 5}), Joined("executor", b""), Left("executor")])
    store.write([Forgotten(1), Outputs({})])
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        tables = ("requests", "choices", "steps", "executors")
        counts = [connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables]

    assert counts == [0, 0, 0, 0]


# --- epochs -------------------------------------------------------------------------------------------------------


def test_epochs_only_grow_though_the_clock_is_set_back(path):
    """An executor refuses a scheduler whose epoch is not above its last one's, for ever."""
    epochs = []
    for now_ms in (1000, 1000, 500, 2000):
        with contextlib.closing(Store.open(path, MIB)) as store:
            epochs += [store.next_epoch(now_ms), store.next_epoch(now_ms)]

    assert epochs == [1000, 1001, 1002, 1003, 1004, 1005, 2000, 2001]


def test_an_epoch_outlives_what_is_rewritten(store, path):
    """Coming back from a full disk must not make the next scheduler a stale one."""
    store.write([accepted(1), Joined("executor", b"")])
    epoch = store.next_epoch(1000)
    path.unlink()
    store.rewrite([accepted(2)], epoch)

    restored = store.load()
    assert [request.number for request in restored.requests] == [2]
    assert restored.joined == []
    assert store.next_epoch(0) == 1001


# --- bounds -------------------------------------------------------------------------------------------------------


def fill(store):
    for number in range(1, 10_000):
        store.write([accepted(number, prompt_count=1000)])


def test_the_database_never_exceeds_its_limit(path):
    """An operator gave it this much of a disk that others use as well; what fitted before stays."""
    with contextlib.closing(Store.open(path, 256 * 1024)) as store:
        with pytest.raises(FullError, match=r"limit of 262144 bytes; raise the limit, or keep results for less time"):
            fill(store)
        count = len(store.load().requests)

        assert count > 30
        assert path.stat().st_size <= 256 * 1024
        assert store.byte_count <= 2 * 256 * 1024

        store.write([Forgotten(1), Forgotten(2), accepted(count + 1, prompt_count=1000)])


def test_a_full_disk_is_not_taken_for_the_limit_of_the_journal(store, path, monkeypatch):
    """Users' results must not be thrown away for a disk that somebody else has filled."""
    monkeypatch.setattr("scheduler_svc.journal.store.shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(JournalError, match="the disk is full") as caught:
        fill(store)

    assert not isinstance(caught.value, FullError)


# --- whose file it is ---------------------------------------------------------------------------------------------


def test_a_second_scheduler_is_refused(store, path):
    """Two that write one journal would each restore the other's requests."""
    assert f"another scheduler (process {os.getpid()}) is using it; end that one" in refusal_of(path)
    other_name = path.with_name("link.db")
    other_name.symlink_to(path)
    with pytest.raises(JournalError, match="is using it; end that one"):
        Store.open(other_name, MIB)


def test_a_closed_journal_can_be_opened_again(path):
    """A restart must not wait for anything that the last life left behind."""
    Store.open(path, MIB).close()
    Store.open(path, MIB).close()


@pytest.mark.parametrize("content", [b"x", b"my thesis\n" * 1000], ids=["short", "long"])
def test_a_file_of_another_kind_is_refused_and_left_alone(path, content):
    """A slip in a path must not cost anybody a file."""
    path.write_bytes(content)

    assert "it is not an SQLite database" in refusal_of(path)
    assert path.read_bytes() == content


def test_a_database_of_something_else_is_refused_and_left_alone(path):
    """The same for a database: ours is known by its application id, not by the names of its tables."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE meta (name, value)")
    content = path.read_bytes()

    assert "it is a database of something else; choose another path" in refusal_of(path)
    with pytest.raises(JournalError, match="something else"):
        Store.read(path)
    assert path.read_bytes() == content


def test_tables_of_another_version_are_refused(path):
    """A release that guesses at tables it does not know would restore nonsense."""
    Store.open(path, MIB).close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE meta SET value = 99 WHERE name = 'schema'")
        connection.commit()

    assert "its tables are of version 99, and this release has version 1; start the release" in refusal_of(path)


def test_a_damaged_journal_is_refused(path):
    """The reason must not be a traceback at four in the morning."""
    with contextlib.closing(Store.open(path, MIB)) as store:
        store.write([accepted(number, prompt_count=1000) for number in range(1, 30)])
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 8 * 4096)
    with pytest.raises(JournalError, match=r"it is damaged .*move the file away"):
        with contextlib.closing(Store.open(path, MIB)) as store:
            store.load()


def test_places_where_no_journal_can_be_are_named(tmp_path):
    """Most mistakes with a path are made once, at the first start."""
    assert "its directory does not exist; make it" in refusal_of(tmp_path / "nowhere" / "journal.db")
    assert "it is not a file" in refusal_of(tmp_path)
    assert "its limit of 1000 bytes is too low; allow 131072 or more" in refusal_of(tmp_path / "j", max_bytes=1000)
    with pytest.raises(JournalError, match="there is no such file"):
        Store.read(tmp_path / "nothing.db")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_is_not_ours_is_refused(tmp_path):
    """In containers this is the commonest mistake of all."""
    tmp_path.chmod(0o500)

    assert "let this user write the file and its directory" in refusal_of(tmp_path / "journal.db")


def test_nobody_else_can_read_the_file(store, path):
    """It holds what users asked and what they were told."""
    store.write([accepted(1)])

    modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    assert modes == dict.fromkeys([path.name, f"{path.name}-wal", f"{path.name}-shm", f"{path.name}.lock"], 0o600)


@pytest.mark.parametrize("suffix", ["", "-wal", ".lock"])
def test_a_file_that_was_removed_is_noticed_and_made_again(store, path, suffix):
    """Linux lets a process write to a file that has no name any more: it would be durable for nobody."""
    store.write([accepted(1)])
    path.with_name(path.name + suffix).unlink()
    with pytest.raises(JournalError, match=f"'{path.name}{suffix}' was removed or replaced"):
        store.write([accepted(2)])
    store.rewrite([accepted(3)], 0)
    store.write([stepped(1, {3: 5})])

    assert output_of(Store.read(path), 3) == [5]
    assert "another scheduler" in refusal_of(path)


# --- reading while it is written ----------------------------------------------------------------------------------


def test_a_live_journal_can_be_read(store, path):
    """An operator looks at what is going on, and replays it, without stopping anything."""
    store.write([accepted(1, keys=(1, 2)), stepped(1, {1: 10, 2: 20}), Joined("executor", b"message")])
    first = Store.read(path)
    store.write([stepped(2, {1: 11})])

    assert first.joined == [b"message"]
    assert output_of(Store.read(path), 1) == [10, 11]


def test_what_a_killed_scheduler_left_can_be_read_without_opening_it(store, path, tmp_path):
    """The files of a crash are copied away to be looked at; the log is part of them."""
    store.write([accepted(1), stepped(1, {1: 10})])
    copy = tmp_path / "copy.db"
    copy.write_bytes(path.read_bytes())
    copy.with_name("copy.db-wal").write_bytes(path.with_name(f"{path.name}-wal").read_bytes())

    assert output_of(Store.read(copy), 1) == [10]


def test_an_empty_file_reads_as_an_empty_journal(path):
    """A scheduler that was killed in its first millisecond leaves this; the next one starts as if it were new."""
    path.touch()

    assert Store.read(path) == Restored()
    with contextlib.closing(Store.open(path, MIB)) as store:
        assert store.load() == Restored()


def test_a_person_reads_who_received_which_token_when(store, path):
    """`sqlite3 journal.db 'select * from tokens'` is the tool that is always there."""
    store.write([accepted(1, keys=(1, 2)), accepted(2, keys=(3,))])
    store.write([stepped(1, {3: 30, 1: 10}), Stepped(3002.5, "executor", 2, (1, 2), (11, 20))])
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        rows = connection.execute("SELECT request, choice, at, token FROM tokens").fetchall()
        (comment,) = connection.execute("SELECT sql FROM sqlite_master WHERE name = 'steps'").fetchone()

    assert rows == [
        ("request 2", 0, "1970-01-01 00:50:01.000", 30),
        ("request 1", 0, "1970-01-01 00:50:01.000", 10),
        ("request 1", 0, "1970-01-01 00:50:02.500", 11),
        ("request 1", 1, "1970-01-01 00:50:02.500", 20),
    ]
    assert "-- unix seconds" in comment
