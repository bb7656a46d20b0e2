"""What becomes of child processes, seen from the supervisor."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from paceline_cli.supervisor import ChildFailedError, RestartPolicy, Supervisor
from tests.paceline_cli.conftest import Recorder, is_alive, python_child, wait_until

QUICK = RestartPolicy(first_delay_s=0.01, longest_delay_s=0.05)
SERVE = "import time; print('here', flush=True); time.sleep(600)"
LISTEN = """
import socket, sys, time, os
address = {address!r}
if os.path.exists(address): os.unlink(address)
server = socket.socket(socket.AF_UNIX); server.bind(address); server.listen()
while True:
    peer, _ = server.accept(); peer.sendall(str(os.getpid()).encode()); peer.close()
"""


def ask(address) -> str:
    """What the process that listens at `address` answers; empty while there is none."""
    import socket

    with socket.socket(socket.AF_UNIX) as peer:
        try:
            peer.connect(address)
            return peer.recv(64).decode()
        except OSError:
            return ""


def test_a_killed_child_is_back_at_the_same_address(tmp_path, recorder: Recorder):
    """Its peers keep the address and only ever see a pause."""
    address = str(tmp_path / "child.sock")
    supervisor = Supervisor([python_child("child", LISTEN.format(address=address))], recorder, QUICK)
    supervisor.start()
    first = wait_until(lambda: ask(address), supervisor.watch)

    os.kill(int(first), signal.SIGKILL)
    second = wait_until(lambda: (answer := ask(address)) != first and answer, supervisor.watch)

    assert second != first
    assert [name for name, _, _ in recorder.restarts] == ["child"]
    assert "SIGKILL" in recorder.restarts[0][1]
    supervisor.kill()


def test_restarts_come_slower_with_each_quick_death():
    """A child that cannot start must not keep the machine busy; one that had settled is back at once."""
    policy = RestartPolicy(first_delay_s=0.1, longest_delay_s=1.0)

    assert [policy.delay_s(count) for count in (1, 2, 3, 4, 5, 50)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]


def test_a_child_that_cannot_start_is_given_up_with_its_last_words(recorder: Recorder):
    """Otherwise the user watches a loop instead of the reason."""
    script = "import sys; print('no memory left for the cache', file=sys.stderr); sys.exit(1)"
    supervisor = Supervisor([python_child("executor-0", script)], recorder, QUICK)
    supervisor.start()

    with pytest.raises(ChildFailedError) as failure:
        wait_until(lambda: False, supervisor.watch)

    assert "executor-0 died 5 times in a row" in failure.value.message
    assert "no memory left for the cache" in failure.value.message
    assert len(recorder.restarts) == 4
    assert [delay for _, _, delay in recorder.restarts] == [0.01, 0.02, 0.04, 0.05]


def test_a_wrong_command_line_is_not_tried_again(recorder: Recorder):
    """Exit code 2 says that trying again cannot help."""
    supervisor = Supervisor([python_child("scheduler", "print('bad flag'); raise SystemExit(2)")], recorder, QUICK)
    supervisor.start()

    with pytest.raises(ChildFailedError, match="bad flag"):
        wait_until(lambda: False, supervisor.watch)

    assert recorder.restarts == []


def test_kills_from_outside_are_survived_as_often_as_they_come(recorder: Recorder):
    """Once everything was ready, a kill says nothing about whether the child can run."""
    supervisor = Supervisor([python_child("executor-0", SERVE)], recorder, QUICK)
    supervisor.start()
    supervisor.ready = True

    for count in range(1, QUICK.quick_death_limit + 3):
        os.kill(wait_until(lambda: supervisor.pids["executor-0"], supervisor.watch), signal.SIGKILL)
        wait_until(lambda count=count: len(recorder.restarts) == count, supervisor.watch)

    supervisor.kill()


def test_a_child_that_was_drained_is_started_again_as_often_as_it_is_drained(recorder: Recorder):
    """A rolling restart ends every executor in good order, some of them twice within seconds."""
    supervisor = Supervisor([python_child("executor-0", "raise SystemExit(0)")], recorder, QUICK)
    supervisor.start()
    supervisor.ready = True
    wait_until(lambda: len(recorder.restarts) >= 7, supervisor.watch)
    supervisor.kill()

    assert {how for _, how, _ in recorder.restarts} == {"ended with exit code 0"}


def test_the_first_child_has_ended_before_the_others_are_asked(tmp_path, recorder: Recorder):
    """The scheduler lets requests finish on executors: they must still be there."""
    order = tmp_path / "order"
    script = """
import signal, sys, time
def leave(*_):
    time.sleep({pause}); open({order!r}, "a").write("{name} "); sys.exit(0)
signal.signal(signal.SIGTERM, leave); print("here", flush=True)
while True: time.sleep(600)
"""
    names = {"scheduler": 0.2, "executor-0": 0.0}
    supervisor = Supervisor(
        [python_child(name, script.format(name=name, pause=pause, order=str(order))) for name, pause in names.items()],
        recorder,
    )
    supervisor.start()
    wait_until(lambda: len(recorder.lines) == 2)

    assert supervisor.drain(60.0)
    assert order.read_text().split() == ["scheduler", "executor-0"]
    assert set(supervisor.pids.values()) == {None}


@pytest.mark.parametrize("why", ["time-out", "second Ctrl-C"])
def test_children_that_do_not_leave_are_killed(why, recorder: Recorder):
    """Whoever stops the server gets their terminal back."""
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SERVE
    supervisor = Supervisor([python_child("executor-0", stubborn)], recorder)
    supervisor.start()
    wait_until(lambda: recorder.lines)
    pid = supervisor.pids["executor-0"]
    assert pid is not None

    clean = supervisor.drain(0.1) if why == "time-out" else supervisor.drain(60.0, hurry=lambda: True)

    assert not clean
    assert not is_alive(pid)


def test_reports_are_told_from_log_lines(recorder: Recorder):
    """Progress moves the bar; it must not be printed, and a log line that looks odd must not be lost."""
    script = r"""
from paceline_cli.parent import send_progress
print("before", flush=True); send_progress("loading", 0.5); print("\x1enot a report", flush=True)
import time; time.sleep(600)
"""
    supervisor = Supervisor([python_child("executor-0", script)], recorder)
    supervisor.start()
    wait_until(lambda: len(recorder.lines) == 2 and recorder.reports)
    supervisor.kill()

    assert recorder.reports == [("executor-0", {"phase": "loading", "fraction": 0.5})]
    assert [line for _, line in recorder.lines] == ["before", "\x1enot a report"]


SUPERVISE = """
import sys, time
from paceline_cli.supervisor import Supervisor
from tests.paceline_cli.conftest import Recorder, python_child
child = '''
import pathlib, signal, sys, time
from paceline_cli.parent import exit_with_parent
def drain(*_):
    print("a log line that nobody reads", flush=True); time.sleep(0.1)
    pathlib.Path({done!r} + sys.argv[1]).touch(); sys.exit(0)
signal.signal(signal.SIGTERM, drain); exit_with_parent(); print("here", flush=True)
while True: time.sleep(600)
'''
recorder = Recorder()
commands = [python_child(name, child.replace("sys.argv[1]", repr(name))) for name in ("a", "b")]
supervisor = Supervisor(commands, recorder)
supervisor.start()
while len(recorder.lines) < 2: time.sleep(0.01)
print(*supervisor.pids.values(), flush=True)
time.sleep(600)
"""


def test_children_drain_when_the_supervisor_is_killed(tmp_path):
    """`kill -9` of the supervisor must not leave servers behind that hold ports and memory, nor cut requests off."""
    import subprocess

    done = str(tmp_path / "drained-")
    child = python_child("supervisor", SUPERVISE.format(done=done))
    with subprocess.Popen(
        child.command, env={**os.environ, **child.environment}, stdout=subprocess.PIPE, text=True
    ) as supervisor:
        assert supervisor.stdout is not None
        pids = [int(pid) for pid in supervisor.stdout.readline().split()]
        assert len(pids) == 2
        supervisor.kill()

    wait_until(lambda: not any(is_alive(pid) for pid in pids))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drained-a", "drained-b"]


def test_ctrl_c_at_the_terminal_reaches_the_supervisor_only(recorder: Recorder):
    """The terminal signals its whole process group; children that got it too would cut requests off."""
    supervisor = Supervisor([python_child("executor-0", SERVE)], recorder)
    supervisor.start()
    pid = supervisor.pids["executor-0"]
    assert pid is not None

    assert os.getpgid(pid) != os.getpgid(os.getpid())
    supervisor.kill()


if sys.platform == "win32":
    pytest.skip("supervision is for POSIX systems", allow_module_level=True)
