"""Whatever happens in whatever order: nothing is lost, repeated, leaked or computed through a wrong block table."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scheduler_svc.core.plan import Capacity, NeverFitsError
from scheduler_svc.core.request import FinishReason, RequestState
from tests.scheduler_svc.core.fleet import Fleet, expected_tokens, is_whole, make_request

CAPACITIES = [
    Capacity(block_size=4, block_count=4, slot_count=2, step_token_count=3),
    Capacity(block_size=4, block_count=8, slot_count=4, step_token_count=8),
    Capacity(block_size=2, block_count=40, slot_count=6, step_token_count=16),
]


class SchedulerMachine(RuleBasedStateMachine):
    """Users, executors and the clock do what they like; the scheduler has to cope."""

    @initialize(capacity=st.sampled_from(CAPACITIES))
    def begin(self, capacity):
        self.fleet = Fleet()
        self.ended_early: set[str] = set()
        self.join_count = 0
        self.now = 0.0
        self.capacity = capacity
        self.join()

    @property
    def executor_ids(self):
        return list(self.fleet.scheduler.executors)

    @rule()
    def join(self):
        if len(self.executor_ids) < 3:
            self.join_count += 1
            self.fleet.join(f"e{self.join_count}", self.capacity)

    @rule()
    def join_small(self):
        """An executor that cannot hold every request that was accepted."""
        if len(self.executor_ids) < 3:
            self.join_count += 1
            self.fleet.join(f"e{self.join_count}", Capacity(4, 2, 1, 2))

    @rule(
        prompt=st.lists(st.integers(0, 255), min_size=1, max_size=14),
        max_output_count=st.integers(1, 12),
        seed=st.none() | st.integers(0, 2**64 - 1),
        stops=st.booleans(),
        patience=st.none() | st.integers(1, 20),
    )
    def add(self, prompt, max_output_count, seed, stops, patience):
        request = make_request(
            f"r{len(self.fleet.requests)}",
            prompt,
            max_output_count,
            seed=seed,
            stop_token_ids=frozenset(range(32, 50)) if stops else frozenset(),
            deadline=self.now + patience if patience else float("inf"),
        )
        try:
            self.fleet.add(request)
        except NeverFitsError:
            needed = -(-(len(prompt) + max_output_count - 1) // self.capacity.block_size)
            assert needed > self.capacity.block_count

    @rule(data=st.data())
    def cancel(self, data):
        live = [r for r in self.fleet.requests.values() if r.state is not RequestState.FINISHED]
        if live:
            request = data.draw(st.sampled_from(live))
            self.fleet.scheduler.cancel(request)
            self.ended_early.add(request.request_id)

    @rule(data=st.data())
    def truncate(self, data):
        """A stop string was found in the text, some tokens late."""
        live = [r for r in self.fleet.requests.values() if r.state is not RequestState.FINISHED and r.output_count]
        if live:
            request = data.draw(st.sampled_from(live))
            output_count = data.draw(st.integers(1, request.output_count))
            self.fleet.scheduler.finish(request, output_count, FinishReason.STOP)
            self.ended_early.add(request.request_id)
            assert request.output_count == output_count

    @rule()
    def time_passes(self):
        self.now += 1
        for request in self.fleet.scheduler.expire(self.now):
            assert request.deadline <= self.now
            self.ended_early.add(request.request_id)

    @rule(data=st.data())
    @precondition(lambda self: self.executor_ids)
    def plan(self, data):
        self.fleet.plan(data.draw(st.sampled_from(self.executor_ids)))

    @rule(data=st.data())
    @precondition(lambda self: self.executor_ids)
    def run(self, data):
        executor_id = data.draw(st.sampled_from(self.executor_ids))
        if self.fleet.has_plan(executor_id):
            self.fleet.run(executor_id)

    @rule(data=st.data())
    @precondition(lambda self: self.executor_ids)
    def plan_and_run(self, data):
        executor_id = data.draw(st.sampled_from(self.executor_ids))
        for _ in range(data.draw(st.integers(1, 6))):
            self.fleet.plan(executor_id)
            if self.fleet.has_plan(executor_id):
                self.fleet.run(executor_id)

    @rule(data=st.data())
    @precondition(lambda self: self.executor_ids)
    def lose(self, data):
        for request in self.fleet.lose(data.draw(st.sampled_from(self.executor_ids))):
            assert request.state is RequestState.WAITING

    @rule(data=st.data())
    @precondition(lambda self: self.executor_ids)
    def drain(self, data):
        self.fleet.scheduler.drain(data.draw(st.sampled_from(self.executor_ids)))

    @invariant()
    def everything_adds_up(self):
        if hasattr(self, "fleet"):
            self.fleet.scheduler.check_invariants()

    @invariant()
    def users_received_what_the_model_says(self):
        """Each token once, in order, computed from the right context, whatever happened to its request."""
        if hasattr(self, "fleet"):
            for request in self.fleet.requests.values():
                received = self.fleet.tokens[request.request_id]
                assert received == expected_tokens(request)[: len(received)]

    def teardown(self):
        if not hasattr(self, "fleet"):
            return
        for executor_id in self.executor_ids:  # those that drain take nothing more: make room for a fresh one
            self.fleet.lose(executor_id)
        self.fleet.join("last", self.capacity)
        self.fleet.run_all()

        assert self.fleet.scheduler.request_count == 0
        for executor in self.fleet.scheduler.executors.values():
            assert executor.blocks.free_count == executor.capacity.block_count
            assert executor.slots.free_count == executor.capacity.slot_count
        for request_id, request in self.fleet.requests.items():
            if request_id not in self.ended_early:
                assert is_whole(request)
                assert self.fleet.tokens[request_id] == expected_tokens(request)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
