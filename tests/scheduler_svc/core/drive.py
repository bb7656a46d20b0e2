"""Steps of one executor without an executor: results are invented, so that thousands of steps take a second."""

import random
from array import array
from collections import deque

from scheduler_svc.core.layer_groups import LayerGroup
from scheduler_svc.core.plan import Capacity, Result
from scheduler_svc.core.request import Request, RequestState, with_choices
from scheduler_svc.core.scheduler import Scheduler

FULL = (LayerGroup(16),)


class Drive:
    """A scheduler with one executor, two plans in flight, and a clock that counts steps."""

    def __init__(
        self,
        policy=None,
        *,
        blocks: int = 256,
        groups: tuple[LayerGroup, ...] = FULL,
        slots: int = 64,
        tokens: int = 512,
        reuse: bool = True,
        seed: int = 0,
        seconds: float = 1.0,
    ) -> None:
        self.scheduler = Scheduler(policy, reuse=reuse)
        self.scheduler.join("e", Capacity(groups, blocks, slots, tokens))
        self.executor = self.scheduler.executors["e"]
        self.draw = random.Random(seed)
        self.now = 0.0
        self.step_count = 0
        self.computed_count = 0
        self.requests: list[Request] = []
        self.expired: list[Request] = []
        self._seconds = seconds
        self._arrival_count = 0
        self._plans = deque()

    def add(self, prompt_count: int, output_count: int, *, begins=(), choices: int = 1, **fields) -> Request:
        """Add a request; `begins` are the first tokens of its prompt, the others are its own."""
        own = [self.draw.randrange(1 << 30) for _ in range(prompt_count - len(begins))]
        prompt = array("I", [*begins, *own])
        self._arrival_count += 1
        request = Request(f"r{self._arrival_count}", prompt, prompt_count, output_count, **fields)
        self.scheduler.add(with_choices(request, choices))
        self.requests.append(request)
        return request

    def step(self):
        """Plan as far as there is credit, and answer the oldest plan; returns what came of it."""
        while (plan := self.scheduler.plan("e", self.now)) is not None:
            self._plans.append(plan)
            self.computed_count += plan.token_count
        outputs = None
        if self._plans:
            plan = self._plans.popleft()
            tokens = [self.draw.randrange(1 << 30) for _ in plan.rows]
            outputs = self.scheduler.apply("e", Result(plan.step, tokens, seconds=self._seconds))
        self.step_count += 1
        self.now += self._seconds
        self.expired += self.scheduler.expire(self.now)
        return outputs

    def run(self, step_limit: int = 100_000) -> None:
        """Step until everybody has ended."""
        for _ in range(step_limit):
            if not self.scheduler.request_count:
                return
            self.step()
        raise AssertionError(f"not done after {step_limit} steps: the scheduler makes no progress")

    @property
    def useful_count(self) -> int:
        """Tokens that had to be computed at least, if nothing is shared."""
        return sum(request.prompt_count + request.output_count - 1 for request in self.requests if request.output_count)

    @property
    def recomputed_share(self) -> float:
        """Tokens computed beyond that, over those."""
        return self.computed_count / self.useful_count - 1

    @property
    def waiting(self) -> list[Request]:
        return [request for request in self.requests if request.state is RequestState.WAITING]
