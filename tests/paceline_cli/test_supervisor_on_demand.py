"""Children that come and go while a supervisor runs."""

from __future__ import annotations

import dataclasses
import os
import signal

import pytest

from paceline_cli.supervisor import ChildFailedError, DrainingError, RestartPolicy, Supervisor
from tests.paceline_cli.conftest import Recorder, is_alive, python_child, wait_until

QUICK = RestartPolicy(first_delay_s=0.01, longest_delay_s=0.02)
SERVE = "import time; print('here', flush=True); time.sleep(600)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SERVE
BROKEN = "print('no memory left for the cache'); raise SystemExit(1)"


@pytest.fixture
def supervisor(recorder: Recorder):
    """One that runs a scheduler, which does nothing."""
    supervisor = Supervisor([python_child("scheduler", SERVE)], recorder, QUICK)
    supervisor.start()
    yield supervisor
    supervisor.kill()


def names(supervisor: Supervisor) -> list[str]:
    return [child.name for child in supervisor.added]


def test_an_added_child_is_kept_alive_like_the_others(supervisor: Supervisor, recorder: Recorder):
    """A crash is for the supervisor to mend, not for whoever wanted the child."""
    supervisor.add(python_child("executor-0", SERVE))
    (before,) = supervisor.added
    os.kill(wait_until(lambda: supervisor.pids["executor-0"]), signal.SIGKILL)
    wait_until(lambda: recorder.restarts and supervisor.pids["executor-0"], supervisor.watch)
    (after,) = supervisor.added

    assert before.is_running
    assert before.last_failure == ""
    assert after.is_running
    assert "SIGKILL" in after.last_failure
    assert after.age_s > before.age_s, "the age counts from the launch, not from the restart"


def test_a_retired_child_is_not_started_again(supervisor: Supervisor, recorder: Recorder):
    """It was drained to make the fleet smaller; a restart would undo that."""
    supervisor.add(python_child("executor-0", SERVE))
    supervisor.retire("executor-0")
    (retired,) = supervisor.added
    os.kill(wait_until(lambda: supervisor.pids["executor-0"]), signal.SIGKILL)
    wait_until(lambda: not supervisor.added, supervisor.watch)

    assert retired.is_retired
    assert retired.is_running
    assert recorder.restarts == []


def test_a_child_retired_between_death_and_restart_is_forgotten_at_once(supervisor: Supervisor, recorder: Recorder):
    """There is no process left whose end could be waited for."""
    supervisor.add(python_child("executor-0", BROKEN))
    wait_until(lambda: recorder.restarts, supervisor.watch)
    supervisor.retire("executor-0")

    assert supervisor.added == []


def test_a_terminated_child_ends_and_is_forgotten(supervisor: Supervisor, recorder: Recorder):
    """Its name is free for the next one only when its process, its port and its memory are gone."""
    supervisor.add(python_child("executor-0", SERVE))
    pid = supervisor.pids["executor-0"]
    assert pid is not None
    supervisor.terminate("executor-0")
    supervisor.terminate("executor-0")
    wait_until(lambda: not supervisor.added, supervisor.watch)

    assert not is_alive(pid)
    assert recorder.restarts == []


def test_a_child_that_does_not_leave_is_killed_when_its_time_is_over(supervisor: Supervisor, recorder: Recorder):
    """A hung process would hold its part of the machine for ever."""
    supervisor.add(dataclasses.replace(python_child("executor-0", STUBBORN), end_within_s=0.1))
    wait_until(lambda: ("executor-0", "here") in recorder.lines)
    pid = supervisor.pids["executor-0"]
    assert pid is not None
    supervisor.terminate("executor-0")
    wait_until(lambda: not supervisor.added, supervisor.watch)

    assert not is_alive(pid)


def test_one_that_cannot_start_does_not_end_the_others(supervisor: Supervisor, recorder: Recorder):
    """The executors that do run answer requests; the reason is listed for whoever wanted one more."""
    scheduler = supervisor.pids["scheduler"]
    supervisor.add(python_child("executor-0", BROKEN))
    supervisor.add(python_child("executor-1", SERVE))
    wait_until(lambda: recorder.given_up, supervisor.watch)
    for _ in range(20):
        supervisor.watch()
    broken, sound = supervisor.added
    supervisor.terminate("executor-0")

    assert not broken.is_running
    assert "died 5 times in a row" in broken.last_failure
    assert "no memory left for the cache" in broken.last_failure
    assert [name for name, _ in recorder.given_up] == ["executor-0"]
    assert sound.is_running
    assert supervisor.pids["scheduler"] == scheduler
    assert names(supervisor) == ["executor-1"]


def test_a_wrong_command_line_is_given_up_at_once(supervisor: Supervisor, recorder: Recorder):
    """Trying it again cannot help, here as at the start."""
    supervisor.add(python_child("executor-0", "raise SystemExit(2)"))
    wait_until(lambda: recorder.given_up, supervisor.watch)

    assert recorder.restarts == []


def test_a_child_from_the_start_still_ends_everything(recorder: Recorder):
    """Without its scheduler a fleet is of no use, however many executors were added."""
    supervisor = Supervisor([python_child("scheduler", BROKEN)], recorder, QUICK)
    supervisor.start()
    supervisor.add(python_child("executor-0", SERVE))
    with pytest.raises(ChildFailedError, match="no memory left"):
        wait_until(lambda: False, supervisor.watch)
    supervisor.kill()


def test_only_added_children_can_be_ended_alone(supervisor: Supervisor):
    """An autoscaler with a wrong name must not take the scheduler down."""
    supervisor.retire("scheduler")
    supervisor.terminate("scheduler")
    supervisor.terminate("executor-7")
    supervisor.watch()

    assert supervisor.pids["scheduler"] is not None


def test_a_drain_ends_added_children_and_lets_no_more_in(supervisor: Supervisor):
    """A child that came during the end would be left behind by it."""
    supervisor.add(python_child("executor-0", SERVE))
    pids = supervisor.pids
    supervisor.drain(60.0)
    with pytest.raises(DrainingError):
        supervisor.add(python_child("executor-1", SERVE))
    supervisor.watch()

    assert not any(is_alive(pid) for pid in pids.values() if pid)
    assert supervisor.pids == {"scheduler": None, "executor-0": None}
