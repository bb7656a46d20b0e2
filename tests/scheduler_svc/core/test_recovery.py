"""Executors that die, drain or come back: who goes on where, and who is to blame."""

from array import array

import pytest

from scheduler_svc.core.plan import HeldAttempt, HeldState, Inventory, ProtocolError, Result
from scheduler_svc.core.request import FinishReason, RequestState
from scheduler_svc.core.scheduler import Scheduler
from tests.scheduler_svc.core.fleet import Fleet, capacity, expected_tokens, make_request

SIZE = capacity(block_size=4, block_count=64, slot_count=8, step_token_count=32)


@pytest.fixture
def fleet():
    fleet = Fleet()
    fleet.join("a", SIZE)
    return fleet


def die(fleet, name):
    """A process is gone in the middle of a step."""
    fleet.plan(name)
    del fleet._executors[name], fleet._plans[name]
    return fleet.scheduler.lose(name, died=True)


def test_a_request_whose_executor_dies_twice_is_not_tried_again(fleet):
    """A request that kills every executor it meets would take the whole fleet with it, one after the other."""
    request = make_request("poison", [1, 2], 5)
    fleet.add(request)
    die(fleet, "a")
    fleet.join("b", SIZE)
    plan = fleet.plan("b")
    fleet.scheduler.executors["b"].started_step = plan.step
    die(fleet, "b")

    assert plan.announces
    assert request.finish_reason is FinishReason.ERROR
    assert "'poison' is given up: 2 executors in a row died while they computed it" in request.error
    fleet.scheduler.check_invariants()


def test_only_the_one_who_kills_is_given_up_and_those_beside_it_go_on(fleet):
    """All that ran on a dead executor are suspects; to try them together again would only make more of them."""
    fleet.add(make_request("poison", [66, 1], 8))
    for n in range(4):
        fleet.add(make_request(f"r{n}", [n, n + 1], 8))
    deaths = 0
    while any(request.request_id == "poison" for request in fleet.alive):
        plan = fleet.plan("a")
        executor = fleet.scheduler.executors["a"]
        computed = {request.request_id for request in plan.rows}
        assert len({request for request in plan.rows if request.is_suspect and request in plan_newcomers(plan)}) <= 1
        executor.started_step = plan.step
        if "poison" not in computed:
            fleet.run("a")
            continue
        deaths += 1
        del fleet._executors["a"], fleet._plans["a"]
        fleet.scheduler.lose("a", died=True)
        fleet.scheduler.check_invariants()
        fleet.join("a", SIZE)
    fleet.run_all()

    assert deaths == 3, "the first time it was one of five; then it did it twice, alone"
    fleet.assert_nothing_is_left()
    for request in fleet.requests[1:]:
        assert fleet.tokens[request] == expected_tokens(request)


def plan_newcomers(plan):
    return {chunk.request for chunk in plan.chunks}


def test_who_was_not_being_computed_when_the_second_executor_died_is_not_to_blame(fleet):
    """Two executors that are killed at once take nobody's request with them: the second never began with it."""
    request = make_request("r", [1, 2], 3)
    fleet.add(request)
    die(fleet, "a")
    fleet.join("b", SIZE)
    assert fleet.plan("b").announces
    die(fleet, "b")
    fleet.join("c", SIZE)
    fleet.run_all()

    fleet.assert_nothing_is_left()
    assert fleet.tokens[request] == expected_tokens(request)


def test_a_token_clears_a_suspect(fleet):
    """Whoever runs for hours outlives many executors, and has killed none of them."""
    request = make_request("r", [1, 2], 8)
    fleet.add(request)
    for name in "bcd":
        die(fleet, min(fleet.scheduler.executors))
        fleet.join(name, SIZE)
        plan = fleet.plan(name)
        fleet.scheduler.executors[name].started_step = plan.step
        fleet.run(name)
        assert not fleet.scheduler.executors[name].suspects
    fleet.run_all()

    assert fleet.tokens[request] == expected_tokens(request)


def test_an_executor_that_falls_silent_makes_nobody_a_suspect(fleet):
    """A cut line or a machine without power is not a request's doing."""
    request = make_request("r", [1, 2], 3)
    fleet.add(request)
    for name in "bcd":
        fleet.plan(min(fleet.scheduler.executors))
        fleet.lose(min(fleet.scheduler.executors))
        fleet.join(name, SIZE)
    fleet.run_all()

    assert fleet.tokens[request] == expected_tokens(request)


def test_a_request_that_lacks_memory_moves_once_and_then_fails(fleet):
    """Another executor, or another moment, may have the room; an endless tour would not find it."""
    request = make_request("large", [1, 2, 3], 4)
    fleet.add(request)
    for expected in (RequestState.WAITING, RequestState.FINISHED):
        plan = fleet.scheduler.plan("a", 0.0)
        slot = int(plan.row_slots[0])
        result = Result(plan.step, [-1], {slot: "no memory"}, out_of_memory=frozenset((slot,)))
        fleet.scheduler.apply("a", result)
        assert request.state is expected
        fleet.scheduler.check_invariants()

    assert (request.finish_reason, request.error) == (FinishReason.ERROR, "no memory")


def test_an_executor_that_hands_over_is_empty_and_its_requests_go_on(fleet):
    """An upgrade waits for nobody's long answer, and costs nobody a token."""
    requests = [make_request(f"r{n}", [n, n + 1], 8, seed=n, choices=1 + n % 3) for n in range(5)]
    for request in requests:
        fleet.add(request)
    for _ in range(3):
        fleet.plan("a")
        fleet.run("a")
    fleet.plan("a")
    fleet.join("b", SIZE)
    fleet.scheduler.drain("a")
    fleet.scheduler.hand_over("a")
    fleet.run("a")
    assert fleet.scheduler.executors["a"].is_idle
    assert all(choice.executor is None for request in requests for choice in request.family)
    fleet.run_all()

    fleet.assert_nothing_is_left()
    for request in fleet.requests:
        assert fleet.tokens[request] == expected_tokens(request)


def test_nothing_is_computed_again_by_an_executor_that_comes_back(fleet):
    """A cut line costs the round trip of an attachment, not the prompts of everybody."""
    for n in range(4):
        fleet.add(make_request(f"r{n}", list(range(n, n + 20)), 6))
    for _ in range(4):
        fleet.plan("a")
        fleet.run("a")
    fleet.plan("a")
    fleet.cut("a", run_count=1, may_return=True)
    outputs = fleet.come_back("a")
    fleet.run_all()

    assert len(outputs.tokens) == 4
    assert fleet.computed_count == sum(len(request.token_ids) - 1 for request in fleet.requests)
    for request in fleet.requests:
        assert fleet.tokens[request] == expected_tokens(request)


def test_requests_of_an_executor_that_does_not_come_back_go_elsewhere_in_their_order(fleet):
    """They have waited longest; nobody who came later goes before them."""
    first, second = make_request("first", [1], 4), make_request("second", [2], 4)
    fleet.add(first)
    fleet.plan("a")
    fleet.cut("a", run_count=0, may_return=True)
    fleet.add(second)
    fleet.join("b", capacity(4, 64, 1, 32))
    assert fleet.scheduler.waiting_count == 2
    fleet.scheduler.give_up("a")
    fleet.plan("b")

    assert (first.state, second.state) == (RequestState.RUNNING, RequestState.WAITING)


def held(**fields):
    values = {"slot": 0, "attempt": 1, "output_ids": array("I"), "computed_count": 0, "state": HeldState.CATCHING_UP}
    return HeldAttempt(**{"block_tables": ((1,),), **values, **fields})


@pytest.mark.parametrize(
    ("attempts", "reason"),
    [
        ([{"slot": 8}], "the inventory names the slots \\[8\\]; there are 8"),
        ([{}, {"request": None}], "the inventory names the slots \\[0, 0\\]"),
        ([{}, {"slot": 1}], "the inventory has a request in two slots"),
        ([{"block_tables": ()}], "slot 0 has 0 block tables, the model has 1 layer groups"),
        ([{"block_tables": ((64,),)}], "slot 0 names block 64, but there are 64"),
        ([{"computed_count": 5}], "slot 0 has 5 computed tokens but 1 blocks"),
    ],
)
def test_an_inventory_that_makes_no_sense_changes_nothing(attempts, reason):
    """A wrong block table would give wrong tokens to somebody, and nobody would know whom to ask."""
    scheduler = Scheduler()
    request = make_request("r", [1, 2, 3, 4, 5, 6], 4)
    scheduler.restore(request, ["a"])
    inventory = Inventory(7, tuple(held(**({"request": request} | fields)) for fields in attempts))

    with pytest.raises(ProtocolError, match=reason):
        scheduler.resume("a", SIZE, inventory)
    scheduler.check_invariants()
    assert (list(scheduler.absent), scheduler.executors) == (["a"], {})
