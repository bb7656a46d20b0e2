"""Many requests while processes die and lines break all the time: `python -m tests.chaos.soak`, or `make soak`.

Prints a table of what was done and what became of the requests; the exit code is 1 if any of them had less, more or
something else than in an undisturbed run, or if anything was left of them at the end.
"""

import argparse
import asyncio
import random
import secrets
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.crowd import Ask, Reader, Verdict, of_every_kind
from tests.chaos.house import SCHEDULER, House
from tests.chaos.proxy import Way
from tests.end_to_end.processes import Services

LEASE_S = 2.0
OUTPUT_COUNT = 100
SCHEDULER_WORDS = ("--lease", f"{LEASE_S:g}", "--drain-timeout", "0", "--resume-wait", "3")
FAKE_WORDS = ("--fake-step-us", "20000", "--fake-block-count", "400", "--max-num-batched-tokens", "128")


@dataclass(frozen=True, slots=True)
class Settings:
    """What is asked of whom."""

    request_count: int = 1000
    client_count: int = 32
    executor_count: int = 3
    seed: int = field(default_factory=lambda: secrets.randbits(32))
    model: str = "fake"
    """Serving folder of a real model in float32; its undisturbed answers are asked for first."""


@dataclass(slots=True)
class Report:
    """What came of it."""

    settings: Settings
    deeds: Counter
    readers: list
    took_s: float
    left: str = ""  # what was left at the end
    verdicts: Counter = field(init=False)

    def __post_init__(self):
        self.verdicts = Counter(reader.verdict() for reader in self.readers)

    @property
    def token_count(self):
        """Tokens that clients have received."""
        return sum(reader.token_count for reader in self.readers)

    @property
    def is_clean(self):
        """Whether nobody could tell that anything happened."""
        right, wrong = self.verdicts[Verdict.RIGHT], self.verdicts[Verdict.WRONG]
        return right + wrong == len(self.readers) and wrong <= self._tie_count_allowed and not self.left

    @property
    def _tie_count_allowed(self):
        """Requests that may turn out otherwise, because two tokens of a real model were as good as each other."""
        if self.settings.model == "fake":
            return 0
        from tests.parity import TIES_ALLOWED  # which brings torch

        return max(1, self.token_count * TIES_ALLOWED)

    def __str__(self):
        usages = [reader.usage for reader in self.readers if reader.usage]
        rows = {
            **{f"{deed}": count for deed, count in sorted(self.deeds.items())},
            "requests": len(self.readers),
            "tokens": self.token_count,
            **{f"requests {verdict}": self.verdicts[verdict] for verdict in (*Verdict,)[1:]},
            "recomputations": sum(usage.recomputation_count for usage in usages),
            "longest pause, s": f"{max(reader.longest_pause_s for reader in self.readers):.1f}",
            "time, s": f"{self.took_s:.0f}",
        }
        table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
        bad = "\n".join(str(reader) for reader in self.readers if reader.verdict() is not Verdict.RIGHT)
        return f"| seed {self.settings.seed} | |\n|---|---:|\n{table}\n\n{bad}\n{self.left}".strip()


class Havoc:
    """Does something terrible to a house every one to three seconds."""

    def __init__(self, house):
        self.deeds = Counter()
        self._house = house
        self._dice = house.dice  # for how each deed is done
        self._fate = random.Random(house.dice.random())  # for what is done when, so that one seed does the same again
        self._doing = set()
        self._menu = {
            "executor killed": (4, self._kill_executor),
            "scheduler killed": (3, self._kill_scheduler),
            "executor and scheduler killed": (1, self._kill_both),
            "executor told to end": (1, self._end_executor),
            "scheduler told to end": (1, self._end_scheduler),
            "executor suspended": (2, self._suspend_executor),
            "scheduler suspended": (1, self._suspend_scheduler),
            "line cut": (2, self._cut),
            "line cut inside a message": (2, self._cut_inside),
            "line half-open": (2, self._half_open),
            "line slow": (1, self._slow),
        }

    async def wreak(self):
        """Go on until cancelled, then let everything live and heal."""
        weights = [weight for weight, _ in self._menu.values()]
        try:
            while True:
                await asyncio.sleep(self._fate.uniform(1, 3))
                (name,) = self._fate.choices(list(self._menu), weights)
                self.deeds[name] += 1
                task = asyncio.create_task(self._menu[name][1]())
                self._doing.add(task)  # some last longer than the pause to the next
                task.add_done_callback(self._doing.discard)
        finally:
            for task in self._doing:
                task.cancel()
            for process in self._house.processes.values():
                process.resume()
            for line in self._house.lines:
                line.heal()

    @property
    def _executor(self):
        return self._dice.choice(self._house.executors)

    @property
    def _line(self):
        return self._dice.choice(self._house.lines)

    async def _kill_executor(self):
        self._house.kill(self._executor)

    async def _kill_scheduler(self):
        self._house.kill(SCHEDULER)

    async def _kill_both(self):
        self._house.kill(SCHEDULER, self._executor)

    async def _end_executor(self):
        self._house.processes[self._executor].terminate()

    async def _end_scheduler(self):
        self._house.processes[SCHEDULER].terminate()

    async def _suspend_executor(self):
        await self._suspend(self._house.processes[self._executor])

    async def _suspend_scheduler(self):
        await self._suspend(self._house.processes[SCHEDULER])

    async def _suspend(self, process):
        process.suspend()
        try:
            await asyncio.sleep(self._dice.uniform(0.2, 2 * LEASE_S))
        finally:
            process.resume()

    async def _cut(self):
        self._line.cut()

    async def _cut_inside(self):
        self._line.cut_after(self._dice.randint(1, 2000), self._dice.choice(list(Way)))

    async def _half_open(self):
        line = self._line
        line.drop(*self._dice.choice([(), (Way.THERE,), (Way.BACK,)]))
        await asyncio.sleep(self._dice.uniform(0.2, 2 * LEASE_S))
        line.heal()

    async def _slow(self):
        line = self._line
        line.delay(self._dice.uniform(0.05, 0.5))
        await asyncio.sleep(self._dice.uniform(0.5, 2))
        line.heal()


async def soak(settings, folder):
    """Run it; sockets, logs and journal are in `folder`. Whatever happens, no process is left."""
    dice = random.Random(settings.seed)
    services = Services(folder)
    try:
        async with House(services, dice) as house:
            names = [f"e{number}" for number in range(settings.executor_count)]
            words = FAKE_WORDS if settings.model == "fake" else ("--dtype", "float32", "--threads", "1")
            await house.start(names, proxied=True, scheduler=SCHEDULER_WORDS, executor=words, model=settings.model)
            asks = _asks(dice, settings.request_count)
            if settings.model != "fake":
                readers = await _read_all(house, settings.client_count, [Ask(a.prompt, a.options) for a in asks])
                asks = [reader.answer() for reader in readers]
            return await _disturbed(settings, house, asks)
    finally:
        services.kill_all()
        await services.close()


async def _disturbed(settings, house, asks):
    havoc = Havoc(house)
    supervising = asyncio.create_task(house.supervise())
    wreaking = asyncio.create_task(havoc.wreak())
    began_at = time.monotonic()
    readers = await _read_all(house, settings.client_count, asks)
    took_s = time.monotonic() - began_at
    for task in (wreaking, supervising):
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    report = Report(settings, havoc.deeds, readers, took_s)
    try:
        await house.assert_clean()
    except AssertionError as error:
        report.left = str(error)
    return report


async def _read_all(house, client_count, asks):
    """Let clients send these requests, each its next when the one before has ended."""
    waiting = iter(asks)
    readers = []

    async def be_a_client():
        client = await house.new_client()
        for ask in waiting:
            readers.append(await Reader(client, ask).read())

    async with asyncio.TaskGroup() as group:
        for _ in range(client_count):
            group.create_task(be_a_client())
    return readers


def _asks(dice, count):
    """Requests of every kind, most of them with short prompts and some with long ones."""
    asks = []
    while len(asks) < count:
        length = dice.choice([20, 20, 20, 300])
        asks += of_every_kind(dice, dice.randint(20, OUTPUT_COUNT), rounds=1, prompt_length=length)
    return asks[:count]


def main():
    """Run it from the command line."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=defaults.request_count)
    parser.add_argument("--clients", type=int, default=defaults.client_count)
    parser.add_argument("--executors", type=int, default=defaults.executor_count)
    parser.add_argument("--seed", type=int, default=defaults.seed, help="the number that all chance comes from")
    parser.add_argument("--model", default="fake", help="serving folder of a small real model")
    words = parser.parse_args()
    settings = Settings(words.requests, words.clients, words.executors, words.seed, words.model)
    with tempfile.TemporaryDirectory(prefix="paceline-") as folder:
        report = asyncio.run(soak(settings, Path(folder)))
    print(report)
    sys.exit(not report.is_clean)


if __name__ == "__main__":
    main()
