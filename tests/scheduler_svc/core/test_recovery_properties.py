"""Streams that break, results that are lost, schedulers that are killed: no wrong token, none lost, none twice."""

from contextlib import suppress

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from scheduler_svc.core.plan import NeverFitsError
from scheduler_svc.core.policies import POLICIES, make_policy
from scheduler_svc.core.request import RequestState
from scheduler_svc.core.scheduler import Scheduler
from tests.scheduler_svc.core.fleet import make_request
from tests.scheduler_svc.core.test_scheduler_properties import BEGINNINGS, SchedulerMachine


class RecoveryMachine(SchedulerMachine):
    """Some of what `SchedulerMachine` does, and lines and schedulers that die at any moment between two messages."""

    join_small = time_passes = drain = lose = plan = run = (
        None  # those are rules there; here they would dilute the rest
    )

    @rule(
        choices=st.sampled_from([1, 1, 1, 2, 3]),
        prompt_counts=st.lists(st.integers(1, 14), min_size=1, max_size=4),
        max_output_count=st.integers(1, 12),
        seed=st.none() | st.integers(0, 2**64 - 1),
        work_count=st.integers(0, 6),
    )
    def add_several(self, prompt_counts, work_count, **fields):
        for prompt_count in prompt_counts:
            self.add_one(prompt_count, **fields)
        self.work(work_count)

    def add_one(self, prompt_count, choices, max_output_count, seed):
        self.request_count += 1
        prompt = BEGINNINGS[self.request_count % 2][:prompt_count]
        request = make_request(f"r{self.request_count}", prompt, max_output_count, seed=seed, choices=choices)
        with suppress(NeverFitsError):
            self.fleet.add(request)

    @rule(count=st.integers(1, 6))
    def work(self, count):
        """Everybody goes on for a few steps, and plans are left on their way."""
        for _ in range(count):
            for executor_id in self.executor_ids:
                self.fleet.plan(executor_id, self.now)
                self.fleet.plan(executor_id, self.now)
                if self.fleet.has_plan(executor_id):
                    self.take_out_the_broken(self.fleet.run(executor_id))
        for executor_id in self.executor_ids:
            self.fleet.plan(executor_id, self.now)

    @initialize(policy=st.sampled_from(list(POLICIES)))
    def choose_the_next_policy(self, policy):
        self.next_policy = policy

    @rule()
    def commit(self):
        """The journal has caught up: only what it holds survives the scheduler."""
        self.fleet.commit()

    @rule(data=st.data(), run_count=st.integers(0, 2), may_return=st.booleans())
    @precondition(lambda self: self.executor_ids)
    def cut(self, data, run_count, may_return):
        for request in self.fleet.cut(data.draw(st.sampled_from(self.executor_ids)), run_count, may_return=may_return):
            assert request.state is RequestState.WAITING

    @rule(data=st.data())
    @precondition(lambda self: self.executor_ids)
    def messages_come_twice_or_in_the_wrong_order(self, data):
        executor_id = data.draw(st.sampled_from(self.executor_ids))
        self.fleet.repeat(executor_id)
        self.fleet.swap(executor_id)

    @rule(data=st.data())
    @precondition(lambda self: self.fleet.absent)
    def come_back(self, data):
        self.take_out_the_broken(self.fleet.come_back(data.draw(st.sampled_from(sorted(self.fleet.absent)))))

    @rule(data=st.data())
    @precondition(lambda self: self.fleet.absent)
    def wait_no_longer(self, data):
        """Its requests go elsewhere, and it may still come back."""
        self.fleet.scheduler.give_up(data.draw(st.sampled_from(sorted(self.fleet.absent))))

    @rule(data=st.data())
    @precondition(lambda self: self.fleet.absent)
    def vanish(self, data):
        self.fleet.vanish(data.draw(st.sampled_from(sorted(self.fleet.absent))))

    @rule(run_counts=st.lists(st.integers(0, 2), min_size=3, max_size=3), work_count=st.integers(0, 3))
    def restart_and_resume(self, run_counts, work_count):
        """The scheduler is back before anybody has given up."""
        self.restart(run_counts)
        for executor_id in sorted(self.fleet.absent):
            self.take_out_the_broken(self.fleet.come_back(executor_id))
            self.fleet.scheduler.check_invariants()
        self.work(work_count)

    @rule(run_counts=st.lists(st.integers(0, 2), min_size=3, max_size=3))
    def restart(self, run_counts):
        reuse = self.fleet.scheduler._reuse
        scheduler = Scheduler(make_policy(self.next_policy), reuse=reuse)
        successors = self.fleet.restart(scheduler, run_counts)
        self.ended_early = {successors.get(request, request) for request in self.ended_early}

    def teardown(self):
        if hasattr(self, "fleet"):
            for executor_id in sorted(self.fleet.absent):
                self.take_out_the_broken(self.fleet.come_back(executor_id))
                self.fleet.scheduler.check_invariants()
        super().teardown()


TestRecovery = RecoveryMachine.TestCase
TestRecovery.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
