"""People who ask, for the tests of scaling."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from paceline import Client


def ask(client: Client, number: int, token_count: int = 100) -> int:
    """One request; the tokens that came."""
    return len(client.generate(f"request {number}", max_output_tokens=token_count, stream=False).token_ids)


@contextmanager
def asking(client: Client, people_count: int) -> Iterator[Callable[[], set[int]]]:
    """Inside, so many people ask one thing after the other: a load that lasts as long as executors take to come.

    Yields what gives the numbers of tokens of all answers, once it is left.
    """
    enough = threading.Event()

    def person(number: int) -> set[int]:
        counts = set()
        while not enough.is_set():
            counts.add(ask(client, number))
        return counts

    with ThreadPoolExecutor(people_count) as people:
        asked = [people.submit(person, number) for number in range(people_count)]
        try:
            yield lambda: set().union(*(one.result() for one in asked))
        finally:
            enough.set()
