"""What is counted and told of executors that go: whom it moved, and whom it did not."""

import time
from array import array

from common.spans import Origin
from scheduler_svc.answers import Terms
from scheduler_svc.arrivals import Arrival
from scheduler_svc.config import SchedulerConfig
from scheduler_svc.core.layer_groups import LayerGroup
from scheduler_svc.core.plan import Capacity, HeldAttempt, HeldState, Inventory, Result
from scheduler_svc.core.request import Request, with_choices
from scheduler_svc.engine import Engine
from scheduler_svc.journal.journal import Journal
from scheduler_svc.load_meter import LoadMeter
from scheduler_svc.observation.observer import Observer
from scheduler_svc.observation.step_meter import StepMeter
from scheduler_svc.observation.tracing import Tracing
from scheduler_svc.recorder import Recorder
from scheduler_svc.text_stream import TextStream
from scheduler_svc.tokenizer import Tokenizer

CAPACITY = Capacity((LayerGroup(4),), 64, 8, 64)
EMPTY = Inventory(last_step=0, held=())


class Link:
    """An executor that computes nothing by itself."""

    incarnation = 1
    draining = False

    def __init__(self, executor_id):
        self.executor_id = executor_id
        self.steps = StepMeter()
        self.plans = []

    def send(self, plan):
        self.plans.append(plan)

    def acknowledge(self, step):
        """Nothing is kept here."""

    def detach(self):
        """Nothing is here."""


class Scene:
    """An engine with executors that die and come back as told."""

    def __init__(self, *executor_ids):
        self.meter = LoadMeter()
        observer = Observer(self.meter, Tracing(None), Origin("paceline-scheduler", "here"), "model")
        self.engine = Engine(SchedulerConfig(model="fake"), Recorder(Journal.off(), 1, "fake"), observer)
        self.links = {name: Link(name) for name in executor_ids}
        for link in self.links.values():
            self.engine.attached(link, CAPACITY, EMPTY)

    def submit(self, request_id="r", choice_count=1):
        request = with_choices(Request(request_id, array("I", range(6)), 6, 20), choice_count)
        texts = [TextStream(Tokenizer.bytes(), ()) for _ in request.family]
        now = time.monotonic()
        arrival = Arrival(request_id, now, self.engine.observer.tracing.accept(None))
        answer = self.engine.submit(request, texts, Terms(), arrival)
        self.timeline = self.engine.observer.find(request_id)
        return answer.request

    def step(self, name):
        """Answer the oldest plan."""
        link = self.links[name]
        plan = link.plans.pop(0)
        self.engine.answered(link, Result(plan.step, [65] * len(plan.rows)))

    def events(self):
        return [(moment.name, moment.facts.get("paceline.executor.id", "")) for moment in self.timeline.moments]

    def counts(self):
        return dict(+self.meter.move_counts), dict(+self.meter.recovery_counts)


async def test_an_executor_that_is_cut_off_and_then_lost_is_told_as_one_story():
    """Who reads a trace must not think that two executors went, or one of them twice."""
    scene = Scene("a")
    scene.submit(choice_count=3)
    for _ in range(2):
        scene.step("a")
    running = len(scene.engine.scheduler.executors["a"].running)
    scene.engine.lost(scene.links["a"], may_return=True)
    cut_off = scene.counts()
    scene.engine.lost(scene.links["a"])

    losses = [event for event in scene.events() if event[0].startswith("executor")]
    assert losses == [("executor cut off", "a"), ("executor did not come back", "a")]
    assert running == 3
    assert cut_off == ({}, {})
    assert scene.counts() == ({"lost": 3}, {"replanned": 1})


async def test_a_loss_says_which_choices_it_moved():
    """Who asks why one of three answers has a gap must not have to guess whose pause it was."""
    scene = Scene("a", "b")
    request = scene.submit(choice_count=3)
    first = request.executor.executor_id
    for _ in range(3):
        scene.step(first)
    moved = sorted(one.choice for one in scene.engine.scheduler.executors[first].running)
    scene.engine.lost(scene.links[first])
    for _ in range(3):
        scene.step("ab".replace(first, ""))

    (lost,) = [moment for moment in scene.timeline.moments if moment.name == "executor lost"]
    again = [moment.facts["paceline.choice"] for moment in scene.timeline.moments if moment.name == "placed again"]
    assert moved == [0, 1, 2]
    assert sorted(lost.facts["paceline.choices"]) == moved
    assert sorted(again) == moved


async def test_an_executor_that_goes_at_once_is_lost_once():
    """There was nothing to wait for, so nothing is told of waiting."""
    scene = Scene("a")
    scene.submit()
    scene.engine.lost(scene.links["a"], died=True)

    assert scene.events() == [("executor lost", "a")]
    assert scene.counts() == ({"lost": 1}, {"replanned": 1})


async def test_a_request_that_is_given_up_has_not_moved():
    """A move that was none hides that somebody got an error; choices that were never forked never were anywhere."""
    scene = Scene("a", "b")
    request = scene.submit(choice_count=3)
    first, second = "ab" if request.executor.executor_id == "a" else "ba"
    scene.links[first].plans.clear()
    scene.engine.lost(scene.links[first], died=True)
    once = scene.counts()
    scene.engine.started(scene.links[second], scene.links[second].plans[-1].step)
    scene.engine.lost(scene.links[second], died=True)

    assert request.has_ended
    assert once == ({"lost": 1}, {"replanned": 1})
    assert scene.counts() == ({"lost": 1}, {"replanned": 1, "given up": 1})


async def test_an_executor_that_comes_back_without_a_request_has_lost_it():
    """The line was mended and the request computed anew all the same: not to count it would hide the cost."""
    scene = Scene("a")
    kept, gone = scene.submit("kept"), scene.submit("gone")
    for _ in range(2):
        scene.step("a")
    tables = tuple(tuple(table.block_ids) for table in kept.tables)
    held = HeldAttempt(
        kept, kept.slot, kept.attempt, kept.output_ids, len(kept.token_ids) - 1, HeldState.DECODING, tables
    )
    step = scene.engine.scheduler.executors["a"].step
    scene.engine.lost(scene.links["a"], may_return=True)
    scene.links["a"].plans.clear()
    scene.engine.attached(scene.links["a"], CAPACITY, Inventory(step, (held,)))

    assert gone.placement_count == 2
    assert scene.events()[-3:] == [
        ("executor cut off", "a"),
        ("executor came back without it", "a"),
        ("placed again", "a"),
    ]
    assert scene.counts() == ({"lost": 1}, {"resumed": 1, "replanned": 1})
