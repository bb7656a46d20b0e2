"""Whatever happens in whatever order: nothing is lost, repeated, leaked or computed through a wrong block table."""

from functools import cache

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scheduler_svc.core.layer_groups import LayerGroup
from scheduler_svc.core.plan import Capacity, NeverFitsError
from scheduler_svc.core.policies import POLICIES, make_policy
from scheduler_svc.core.request import FinishReason, RequestState
from tests.scheduler_svc.core.fleet import Fleet, expected_tokens, is_whole, make_request

# Kinds of models: full attention, hybrids with and without equal block sizes, only windows, chunks.
LAYER_GROUPS = [
    (LayerGroup(4),),
    (LayerGroup(2),),
    (LayerGroup(4), LayerGroup(4, window=6)),
    (LayerGroup(6), LayerGroup(2, window=7)),
    (LayerGroup(2, window=5),),
    (LayerGroup(4), LayerGroup(4, chunk=8)),
    (LayerGroup(4), LayerGroup(2, window=3), LayerGroup(2, window=9)),
]
SIZES = [(4, 2, 3), (8, 4, 8), (24, 4, 8), (60, 6, 16)]  # blocks, slots, tokens of a step
BEGINNINGS = [[7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67], [7, 11, 13, 17, 20] * 4]


@cache
def said(request, layer_groups):
    return expected_tokens(request, layer_groups)


class SchedulerMachine(RuleBasedStateMachine):
    """Users, executors and the clock do what they like; the scheduler has to cope."""

    @initialize(
        layer_groups=st.sampled_from(LAYER_GROUPS),
        size=st.sampled_from(SIZES),
        policy=st.sampled_from(list(POLICIES)),
        reuse=st.sampled_from([True, True, False]),
    )
    def begin(self, layer_groups, size, policy, reuse):
        self.fleet = Fleet(make_policy(policy), reuse=reuse)
        self.ended_early = set()
        self.join_count = self.request_count = 0
        self.now = 0.0
        self.capacity = Capacity(layer_groups, *size)
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
            self.fleet.join(f"e{self.join_count}", Capacity(self.capacity.layer_groups, 3, 1, 2))

    @rule(
        beginning=st.sampled_from(BEGINNINGS),
        shared_count=st.integers(0, 14),
        rest=st.lists(st.integers(0, 255), max_size=8),
        max_output_count=st.integers(1, 12),
        seed=st.none() | st.integers(0, 2**64 - 1),
        choices=st.sampled_from([1, 1, 1, 2, 3]),
        stops=st.booleans(),
        patience=st.none() | st.integers(1, 20),
        bounded=st.booleans(),
        priority=st.integers(-1, 1),
        tenant=st.sampled_from("ab"),
        cache_salt=st.sampled_from(["", "", "salt"]),
    )
    def add(self, beginning, shared_count, rest, stops, patience, bounded, max_output_count, **fields):
        prompt = [*beginning[:shared_count], *rest] or [1]
        self.request_count += 1
        request = make_request(
            f"r{self.request_count}",
            prompt,
            max_output_count,
            stop_token_ids=frozenset(range(32, 50)) if stops else frozenset(),
            deadline=self.now + patience if patience else float("inf"),
            length_is_bounded=bounded,
            **fields,
        )
        try:
            self.fleet.add(request)
        except NeverFitsError:
            whole = sum(group.blocks_for(request.cache_limit) for group in self.capacity.layer_groups)
            assert whole > self.capacity.block_count

    @rule(data=st.data())
    def cancel(self, data):
        if self.fleet.alive:
            request = data.draw(st.sampled_from(self.fleet.alive))
            self.fleet.scheduler.cancel(request)
            self.ended_early.update(request.family)
            assert request.has_ended

    @rule(data=st.data())
    def truncate(self, data):
        """A stop string was found in the text, some tokens late."""
        alive = [request for request in self.fleet.alive if request.output_count]
        if alive:
            request = data.draw(st.sampled_from(alive))
            output_count = data.draw(st.integers(1, request.output_count))
            self.fleet.scheduler.finish(request, output_count, FinishReason.STOP)
            self.ended_early.add(request)
            assert request.output_count == output_count

    @rule()
    def time_passes(self):
        self.now += 1
        for request in self.fleet.scheduler.expire(self.now):
            assert request.deadline <= self.now or self.fleet.scheduler.policy.sheds
            assert request.state is RequestState.FINISHED
            self.ended_early.add(request)

    @rule(data=st.data())
    @precondition(lambda self: self.executor_ids)
    def break_a_row(self, data):
        """Something goes wrong in one row of a step, after it has written garbage to its blocks."""
        executor_id = data.draw(st.sampled_from(self.executor_ids))
        self.fleet.break_row(executor_id, data.draw(st.integers(0, self.capacity.slot_count - 1)))

    @rule(data=st.data())
    @precondition(lambda self: self.executor_ids)
    def plan(self, data):
        self.fleet.plan(data.draw(st.sampled_from(self.executor_ids)), self.now)

    @rule(data=st.data())
    @precondition(lambda self: self.executor_ids)
    def run(self, data):
        executor_id = data.draw(st.sampled_from(self.executor_ids))
        if self.fleet.has_plan(executor_id):
            self.take_out_the_broken(self.fleet.run(executor_id))

    def take_out_the_broken(self, outputs):
        self.ended_early.update(r for r in outputs.finished if r.finish_reason is FinishReason.ERROR)

    @rule(data=st.data())
    @precondition(lambda self: self.executor_ids)
    def plan_and_run(self, data):
        executor_id = data.draw(st.sampled_from(self.executor_ids))
        for _ in range(data.draw(st.integers(1, 8))):
            self.fleet.plan(executor_id, self.now)
            self.fleet.scheduler.check_invariants()
            if self.fleet.has_plan(executor_id):
                self.take_out_the_broken(self.fleet.run(executor_id))
                self.fleet.scheduler.check_invariants()

    @rule(data=st.data())
    @precondition(lambda self: self.executor_ids)
    def lose(self, data):
        for request in self.fleet.lose(data.draw(st.sampled_from(self.executor_ids))):
            assert request.state is RequestState.WAITING

    @rule(data=st.data(), draining=st.sampled_from([True, True, False]))
    @precondition(lambda self: self.executor_ids)
    def drain(self, data, draining):
        self.fleet.scheduler.drain(data.draw(st.sampled_from(self.executor_ids)), draining)

    @invariant()
    def everything_adds_up(self):
        if hasattr(self, "fleet"):
            self.fleet.scheduler.check_invariants()

    @invariant()
    def users_received_what_the_model_says(self):
        """Each token once, in order, computed from the right context, whatever happened to its request."""
        if hasattr(self, "fleet"):
            for request, received in self.fleet.tokens.items():
                assert received == said(request, self.capacity.layer_groups)[: len(received)]

    @invariant()
    def only_broken_rows_fail(self):
        """Whatever else the executor may find wrong with a row is a mistake of the scheduler's."""
        if hasattr(self, "fleet"):
            for request in self.fleet.requests:
                assert request.finish_reason is not FinishReason.ERROR or "a row is broken" in request.error

    def teardown(self):
        if not hasattr(self, "fleet"):
            return
        for executor_id in self.executor_ids:  # whoever is there now must get on, without any event from outside
            self.fleet.scheduler.drain(executor_id, draining=False)
            self.fleet.break_row(executor_id, None)
        self.fleet.run_all()
        assert all(request.state is RequestState.WAITING for request in self.fleet.alive), "somebody is stuck"
        self.fleet.join("last", self.capacity)  # for those who fit nobody else
        self.fleet.run_all()

        self.fleet.assert_nothing_is_left()
        for request in self.fleet.requests:
            if request not in self.ended_early:
                assert is_whole(request)
                assert self.fleet.tokens[request] == said(request, self.capacity.layer_groups)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
