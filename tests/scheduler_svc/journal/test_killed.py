"""A scheduler that is killed at any moment: what it had released is there when the next one starts."""

import asyncio
import contextlib
import random
import shutil
import sys

import pytest

from scheduler_svc.journal.journal import Journal
from scheduler_svc.journal.store import Store
from tests.scheduler_svc.journal.samples import MIB, Model, accepted, durable, opened, output_of, stepped

# Steps of two choices, token == step, with checkpoints; says which step was released.
WRITER = """
import asyncio, os, sys
from scheduler_svc.journal.journal import Journal
from tests.scheduler_svc.journal.samples import MIB, Model, accepted, stepped

async def main():
    journal = Journal.open(sys.argv[1], MIB, checkpoint_steps=64)
    model = Model()
    journal.outputs = model.live_outputs
    for step in range(-1, 10**9):
        record = stepped(step, {1: step, 2: step}) if step >= 0 else accepted(1, keys=(1, 2))
        model.apply(record)
        journal.append(record)
        journal.then(lambda step=step: os.write(1, b"%d\\n" % step))
        if step % 3 == 0:
            await asyncio.sleep(0.0002)

asyncio.run(main())
"""


@pytest.mark.parametrize("seed", range(3))
async def test_what_was_released_survives_a_kill(tmp_path, seed):
    """`kill -9` runs no handler and closes no file: only what was committed counts, and all of it."""
    path = tmp_path / "journal.db"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WRITER, str(path), stdout=asyncio.subprocess.PIPE
    )
    released = -1
    dies_after = random.Random(seed).randrange(50, 1500)
    async for line in process.stdout:
        released = int(line)
        if released == dies_after:
            process.kill()
    await process.wait()
    with contextlib.closing(Store.open(path, MIB)) as store:
        restored = store.load()

    outputs = [output_of(restored, key) for key in (1, 2)]
    assert released >= dies_after
    assert outputs[0] == outputs[1] == list(range(len(outputs[0])))
    assert len(outputs[0]) > released


async def test_the_files_make_sense_after_every_commit(tmp_path):
    """The moments that a kill does not happen to hit: each commit is a whole, whatever the next one would have been."""
    path = tmp_path / "journal.db"
    model = Model()
    async with opened(path, MIB, checkpoint_steps=5) as journal:
        journal.outputs = model.live_outputs
        for step in range(40):
            record = stepped(step, {1: step, 2: step}) if step else accepted(1, keys=(1, 2))
            model.apply(record)
            journal.append(record)
            await durable(journal)
            copy = tmp_path / f"copy{step}.db"
            shutil.copy(path, copy)
            shutil.copy(f"{path}-wal", f"{copy}-wal")
            assert Store.read(copy).requests == model.restored_requests()


async def test_readers_see_whole_transactions_while_it_is_written(tmp_path):
    """`paceline replay` on a live journal must not show a choice without its prompt or half a step."""
    path = tmp_path / "journal.db"
    journal = Journal.open(path, MIB, checkpoint_steps=50)
    model = Model()
    journal.outputs = model.live_outputs

    async def write():
        for step in range(400):
            record = stepped(step, {1: step, 2: step}) if step else accepted(1, keys=(1, 2))
            model.apply(record)
            journal.append(record)
            await durable(journal)

    writing = asyncio.create_task(write())
    counts = []
    while not writing.done():
        restored = await asyncio.to_thread(Store.read, path)
        if restored.requests:
            first, second = (output_of(restored, key) for key in (1, 2))
            assert first == second == list(range(1, len(first) + 1))
            counts.append(len(first))
    await writing
    await journal.close()

    assert counts == sorted(counts)
    assert len(set(counts)) > 3
