"""Records as a scheduler would write them, and a plain model of what they mean."""

import asyncio
from array import array
from collections.abc import Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from scheduler_svc.journal.journal import Journal
from scheduler_svc.journal.records import (
    Accepted,
    ChoiceEnded,
    Forgotten,
    Joined,
    Left,
    Outputs,
    Placed,
    Record,
    RequestEnded,
    Stepped,
)
from scheduler_svc.journal.restored import Restored, RestoredChoice, RestoredRequest

MIB = 1024 * 1024


def accepted(number: int, keys: Sequence[int] = (), prompt_count: int = 3) -> Accepted:
    """A request whose choices have the keys `keys`, or one with the request's own number."""
    return Accepted(
        number=number,
        request_id=f"request {number}",
        content_hash=number.to_bytes(4, "little"),
        accepted_at=1000.0 + number,
        deadline_at=None if number % 2 else 2000.5,
        prompt_ids=array("I", [number] * prompt_count),
        parameters={"temperature": 0.5, "stop": ["\n", "é\ud800"], "number": number},
        keys=tuple(keys) or (number,),
    )


def stepped(step: int, tokens: dict[int, int]) -> Stepped:
    """A step that gave each of these choices a token."""
    return Stepped(3000.0 + step, "executor", step, list(tokens), list(tokens.values()))


def output_of(restored: Restored, key: int) -> list[int]:
    """The tokens of a choice."""
    (output,) = (
        choice.output_ids.tolist() for request in restored.requests for choice in request.choices if choice.key == key
    )
    return output


@asynccontextmanager
async def opened(*args, **options) -> Iterator[Journal]:
    """A journal for as long as the block runs."""
    journal = Journal.open(*args, **options)
    try:
        yield journal
    finally:
        await journal.close()


async def durable(journal: Journal) -> None:
    """Wait as a reader would: until everything so far is released."""
    released = asyncio.Event()
    journal.then(released.set)
    await released.wait()


@dataclass
class Model:
    """What a journal should remember, in plain dicts."""

    requests: dict[int, Accepted] = field(default_factory=dict)
    ended_at: dict[int, float] = field(default_factory=dict)
    outputs: dict[int, list[int]] = field(default_factory=dict)
    ends: dict[int, tuple[str, str]] = field(default_factory=dict)
    placements: dict[int, tuple] = field(default_factory=dict)
    joined: dict[str, bytes] = field(default_factory=dict)

    def apply(self, record: Record) -> None:
        """Remember a record."""
        match record:
            case Accepted():
                self.requests[record.number] = record
                self.outputs |= {key: [] for key in record.keys}
            case Placed(key, executor_id, incarnation, epoch, attempt, placement_count):
                self.placements[key] = (executor_id, incarnation, epoch, attempt, placement_count)
            case Stepped(keys=keys, token_ids=token_ids):
                for key, token_id in zip(keys, token_ids, strict=True):
                    if key in self.outputs and key not in self.ends:
                        self.outputs[key].append(token_id)
            case ChoiceEnded(key, output_ids, finish_reason, error):
                self.outputs[key] = output_ids.tolist()
                self.ends[key] = (finish_reason, error)
            case RequestEnded(number, at):
                self.ended_at[number] = at
            case Forgotten(number):
                for key in self.requests.pop(number).keys:
                    for known in (self.outputs, self.ends, self.placements):
                        known.pop(key, None)
            case Joined(executor_id, message):
                self.joined[executor_id] = message
            case Left(executor_id):
                self.joined.pop(executor_id, None)
            case Outputs():
                pass  # says what is known already

    def live_outputs(self) -> Outputs:
        """The tokens of all choices that have not ended."""
        live = self.outputs.keys() - self.ends.keys()
        return Outputs({key: array("I", self.outputs[key]) for key in live})

    def restored_requests(self) -> list[RestoredRequest]:
        """The requests as a journal returns them."""
        return [
            RestoredRequest(
                number,
                record.request_id,
                record.content_hash,
                record.accepted_at,
                record.deadline_at,
                self.ended_at.get(number),
                record.prompt_ids,
                record.parameters,
                [self._choice(choice, key) for choice, key in enumerate(record.keys)],
            )
            for number, record in sorted(self.requests.items())
        ]

    def _choice(self, choice: int, key: int) -> RestoredChoice:
        placement = self.placements.get(key, (None, 0, 0, 0, 0))
        end = self.ends.get(key, (None, ""))
        return RestoredChoice(key, choice, array("I", self.outputs[key]), *end, *placement)
