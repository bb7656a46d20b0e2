"""Policies: small objects that say whose turn it is.

A policy orders; it moves nothing. The same order decides who is placed first, whose tokens are computed first, and,
from its end, who gives its blocks back when they run out.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable
from typing import ClassVar

from scheduler_svc.core.request import Rank, Request

OVERTAKING_LIMIT = 16
"""How many weaker claims may be placed while a request finds no room: small ones need not wait for a large one, and
the large one does not wait for ever."""


class Policy:
    """First come, first served, and what the others change of it."""

    name: ClassVar[str] = "fifo"
    prefill_first: ClassVar[bool] = False  # tokens of requests that catch up go before those of requests that decode
    displaces: ClassVar[bool] = False  # somebody who runs may give way to a stronger claim
    sheds: ClassVar[bool] = False  # requests that cannot meet their deadline are refused, or have to wait

    def rank(self, request: Request) -> Rank:
        """How strong the request's claim is, the smaller the stronger; it ends with the arrival and never changes."""
        return (request.arrival,)

    def may_overtake(self, later: Request, earlier: Request) -> bool:
        """Whether `later` may be placed where `earlier`, whose claim is stronger, could run and finds no room.

        Nobody overtakes a request that has run and gave its blocks back: they were not given for a newcomer.
        """
        return not earlier.placement_count and earlier.overtaken_count < OVERTAKING_LIMIT

    def may_displace(self, waiting: Request, running: Request) -> bool:
        """Whether a running request gives way to a waiting one that finds no room. If `displaces`."""
        return False

    # The queue keeps one line for each value of `line`, and asks whose turn it is.

    def line(self, request: Request) -> str:
        """Which line of the queue the request stands in."""
        return ""

    def begin_line(self, line: str, lines: Collection[str]) -> None:
        """Somebody waits in a line that was empty; `lines` are the others in which somebody does."""

    def next_line(self, lines: Collection[str]) -> str:
        """Whose turn it is among the lines in which somebody waits; there is one."""
        return next(iter(lines))

    # What requests have received.

    def note_started(self, request: Request) -> None:
        """A request was placed for the first time."""

    def note_tokens(self, tokens: Iterable[tuple[Request, int]]) -> None:
        """Tokens were generated."""


class PrefillFirst(Policy):
    """First come, first served, and whoever has a prompt to compute goes before those who decode.

    First tokens come sooner, and everybody else's next token later: a step's tokens go to prompts as long as there
    are any. As `PrefillFirstScheduler` of transformers.
    """

    name = "prefill_first"
    prefill_first = True


class Priority(Policy):
    """The larger priority goes first, and takes the place of smaller ones that run when there is no room."""

    name = "priority"
    displaces = True

    def rank(self, request: Request) -> Rank:
        return (-request.priority, request.arrival)

    def may_overtake(self, later: Request, earlier: Request) -> bool:
        return later.priority == earlier.priority and super().may_overtake(later, earlier)

    def may_displace(self, waiting: Request, running: Request) -> bool:
        return running.priority < waiting.priority


class Deadline(Policy):
    """The earliest deadline goes first (EDF, Liu and Layland 1973), and nothing runs that comes too late.

    A request that cannot even have its first token in time is ended at once. One that cannot be finished in time as
    things are waits while another could be. Running requests without a deadline give way to those that have one.
    """

    name = "deadline"
    displaces = True
    sheds = True

    def rank(self, request: Request) -> Rank:
        return (request.deadline, request.arrival)

    def may_overtake(self, later: Request, earlier: Request) -> bool:
        return False

    def may_displace(self, waiting: Request, running: Request) -> bool:
        return waiting.deadline < math.inf == running.deadline


class Fair(Policy):
    """Tenants with work waiting get equal service, in tokens.

    The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): each tenant's
    counter grows with the weighted tokens that it receives, prompts when they are placed and outputs as they come; the
    smallest counter's oldest request is placed next. A tenant that comes back is lifted to the smallest counter of
    those who wait, so that nobody saves service up.

    Two tenants that both always have work waiting differ by at most 2 * max(input weight * longest prompt, output
    weight * tokens that requests running together can generate), whatever their requests look like: see
    `service_bound`.
    """

    name = "fair"

    def __init__(self, input_weight: float = 1.0, output_weight: float = 2.0) -> None:
        """Weigh each prompt token and each generated token."""
        self.input_weight = input_weight
        self.output_weight = output_weight
        self.served: dict[str, float] = {}  # by tenant; those at or below the floor are left out
        self._order: list[tuple[float, str]] = []  # a heap of (counter, tenant); counters may be out of date
        self._ordered: set[str] = set()  # the tenants in it, each of them once
        self._forget_at = 64  # tenants in `served` at which the next clean-up is due
        self._last = ""  # the tenant whose turn it was last

    def service_bound(self, longest_prompt: int, running_output_count: int) -> float:
        """How far the weighted service of two tenants that always have work waiting can be apart."""
        return 2 * max(self.input_weight * longest_prompt, self.output_weight * running_output_count)

    def may_overtake(self, later: Request, earlier: Request) -> bool:
        return False

    def line(self, request: Request) -> str:
        return request.tenant

    def begin_line(self, line: str, lines: Collection[str]) -> None:
        floor = min((self._counter(other) for other in lines), default=self._counter(self._last))
        self.served[line] = max(self._counter(line), floor)
        if line not in self._ordered:
            heapq.heappush(self._order, (self.served[line], line))
            self._ordered.add(line)
        if len(self.served) > self._forget_at:
            self._forget(floor, lines)
            self._forget_at = 2 * len(self.served) + 64

    def next_line(self, lines: Collection[str]) -> str:
        while True:
            counter, line = self._order[0]
            if line not in lines:
                heapq.heappop(self._order)
                self._ordered.remove(line)
            elif counter != self.served[line]:
                heapq.heapreplace(self._order, (self.served[line], line))
            else:
                self._last = line
                return line

    def note_started(self, request: Request) -> None:
        if not request.choice:  # its choices share the prompt
            self._charge(request.tenant, self.input_weight * request.prompt_count)

    def note_tokens(self, tokens: Iterable[tuple[Request, int]]) -> None:
        for request, _ in tokens:
            self._charge(request.tenant, self.output_weight)

    def _charge(self, tenant: str, service: float) -> None:
        self.served[tenant] = self._counter(tenant) + service

    def _counter(self, tenant: str) -> float:
        return self.served.get(tenant, 0.0)

    def _forget(self, floor: float, lines: Collection[str]) -> None:
        """Forget the counters that make no difference: their tenants would be lifted above them when they come back."""
        self.served = {
            tenant: counter
            for tenant, counter in self.served.items()
            if counter > floor or tenant in lines or tenant in self._ordered or tenant == self._last
        }


POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (Policy, PrefillFirst, Priority, Deadline, Fair)}


def make_policy(name: str, *, input_weight: float = 1.0, output_weight: float = 2.0) -> Policy:
    """The policy of that name; the weights are those of `fair`. Raises `ValueError` for another name."""
    if name not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got '{name}'")
    if name != Fair.name:
        return POLICIES[name]()
    for which, weight in (("input", input_weight), ("output", output_weight)):
        if not 0 < weight < math.inf:
            raise ValueError(f"the {which} weight of policy 'fair' must be above 0 and finite, got {weight:g}")
    return Fair(input_weight, output_weight)
