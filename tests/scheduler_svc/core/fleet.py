"""A whole fleet in one thread: the scheduler core, the real step messages, and executors with the fake model."""

from array import array
from collections import deque

from executor_svc.config import ExecutorConfig
from executor_svc.executor import Executor
from executor_svc.fake import FakeRunner, next_token
from paceline.internal.v1 import executor_pb2 as pb
from scheduler_svc import wire
from scheduler_svc.core.plan import Capacity, Outputs
from scheduler_svc.core.request import FinishReason, Request, Sampling
from scheduler_svc.core.scheduler import Scheduler


def fake_executor(capacity: Capacity) -> Executor:
    """An executor with the fake model, which takes no time."""
    return Executor(
        FakeRunner(
            ExecutorConfig(
                model="fake",
                block_size=capacity.block_size,
                fake_block_count=capacity.block_count,
                max_num_seqs=capacity.slot_count,
                max_num_batched_tokens=capacity.step_token_count,
                max_model_len=capacity.block_count * capacity.block_size,
                fake_step_us=0,
                fake_token_us=0,
            )
        )
    )


class Fleet:
    """Drives a scheduler and its executors event by event; every message crosses the wire format."""

    def __init__(self) -> None:
        self.scheduler = Scheduler()
        self.requests: dict[str, Request] = {}
        self.tokens: dict[str, list[int]] = {}  # what each request's user received
        self._executors: dict[str, Executor] = {}
        self._plans: dict[str, deque[bytes]] = {}  # sent and not run

    def join(self, executor_id: str, capacity: Capacity) -> None:
        self.scheduler.join(executor_id, capacity)
        self._executors[executor_id] = fake_executor(capacity)
        self._plans[executor_id] = deque()

    def lose(self, executor_id: str) -> list[Request]:
        del self._executors[executor_id], self._plans[executor_id]
        return self.scheduler.lose(executor_id)

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self.requests[request.request_id] = request
        self.tokens[request.request_id] = []

    def plan(self, executor_id: str):
        plan = self.scheduler.plan(executor_id, now=0.0)
        if plan is not None:
            self._plans[executor_id].append(wire.encode_plan(plan).SerializeToString())
        return plan

    def has_plan(self, executor_id: str) -> bool:
        return bool(self._plans[executor_id])

    def run(self, executor_id: str) -> Outputs:
        """Let the executor run its oldest plan, and apply the result."""
        plan = pb.Plan.FromString(self._plans[executor_id].popleft())
        message = self._executors[executor_id].execute(plan).SerializeToString()
        outputs = self.scheduler.apply(executor_id, wire.decode_result(pb.StepResult.FromString(message)))
        for request, token in outputs.tokens:
            self.tokens[request.request_id].append(token)
        return outputs

    def run_all(self, step_limit: int = 10_000) -> None:
        """Plan and run until nothing is left that could run."""
        for _ in range(step_limit):
            planned = [self.plan(executor_id) for executor_id in self._executors]
            runnable = [executor_id for executor_id in self._executors if self._plans[executor_id]]
            if not runnable and not any(planned):
                return
            for executor_id in runnable:
                self.run(executor_id)
        raise AssertionError(f"not done after {step_limit} steps: the scheduler makes no progress")


def make_request(
    request_id: str,
    prompt: list[int],
    max_output_count: int,
    *,
    seed: int | None = None,
    stop_token_ids: frozenset[int] = frozenset(),
    deadline: float = float("inf"),
) -> Request:
    """A request as the edge would make it."""
    return Request(
        request_id=request_id,
        token_ids=array("I", prompt),
        prompt_count=len(prompt),
        max_output_count=max_output_count,
        sampling=Sampling(temperature=0.0 if seed is None else 1.0, seed=seed or 0),
        stop_token_ids=stop_token_ids,
        deadline=deadline,
    )


def expected_tokens(request: Request) -> list[int]:
    """What the fake model says to the request when nothing disturbs it."""
    known = list(request.token_ids[: request.prompt_count])
    seed = request.sampling.seed if request.sampling.temperature else None
    for index in range(request.max_output_count):
        known.append(next_token(known, seed, index))
        if known[-1] in request.stop_token_ids:
            break
    return known[request.prompt_count :]


def is_whole(request: Request) -> bool:
    """Whether the request ended by itself, not because somebody ended it."""
    return request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
