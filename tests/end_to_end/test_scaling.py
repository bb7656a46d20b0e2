"""The number of executors follows the load: real processes, real servers, no model."""

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from paceline import Client, TimedOut
from tests.end_to_end.asking import ask, asking
from tests.paceline_cli.conftest import REPOSITORY, wait_until
from tests.paceline_cli.test_serve import Served

FILE = """
executors: {min: 0, max: 3}
policies: [{kind: threshold, target: 4, down_window: 1s}]
cooldowns: {down: 1s, zero: 2s}
times: {interval: 200ms, finish: 0}
"""
SERVE = ("--fake-step-us", "20000", "--fake-load-us", "1000000", "--log-level", "info", "--drain-timeout", "2")


@pytest.fixture
def served(tmp_path):
    """Scheduler, autoscaler, and no executor."""
    file = tmp_path / "scaling.yaml"
    file.write_text(FILE)
    running = Served(tmp_path / "printed", "--scaling", str(file), *SERVE)
    yield running
    running.process.terminate()
    running.process.wait(60)


def decisions(served: Served) -> list[int]:
    """What was wanted, decision by decision, as the log has it."""
    return [int(wanted) for wanted in re.findall(r"decided wanted=(\d+)", served.printed)]


def count_of(client: Client) -> int:
    """Executors that are attached."""
    return client.model().executor_count


def test_executors_come_with_the_load_and_go_with_it_and_no_request_fails(served):
    """The promise: from none to the limit and back to none, with every answer whole and every decision in the log."""
    with Client(served.address) as client, ThreadPoolExecutor(32) as people:
        assert count_of(client) == 0
        wait_until(lambda: decisions(served))  # that none is wanted: what comes sooner is what the first one is about
        assert ask(client, 0, 8) == 8  # held until the first one is there
        with asking(client, 24) as token_counts:
            wait_until(lambda: count_of(client) == 3)
        assert token_counts() == {100}
        trickle = [people.submit(ask, client, number, 200) for number in range(3)]
        wait_until(lambda: count_of(client) == 1)  # those who ran elsewhere have moved
        assert [answer.result() for answer in trickle] == [200] * 3
        wait_until(lambda: count_of(client) == 0)
        assert ask(client, 99, 8) == 8

    wanted = decisions(served)
    assert wanted[0] == 0
    assert max(wanted) == 3
    assert "threshold requests wants" in served.printed
    assert "least to lose" in served.printed
    assert "Traceback" not in served.printed
    assert "executor lost" not in served.printed


def test_an_autoscaler_that_dies_changes_nothing_until_it_is_back(served):
    """It owns no process and no request: whoever runs goes on, whoever comes later is served later."""
    with Client(served.address) as client:
        with asking(client, 6) as token_counts:
            wait_until(lambda: count_of(client) == 2)
            victim = next(pid for pid in served.child_pids() if " autoscaler " in served.command_of(pid))
            os.kill(victim, signal.SIGKILL)

        assert token_counts() == {100}
        wait_until(lambda: count_of(client) == 0)  # the next one goes on where it was
        assert ask(client, 9, 8) == 8
    assert "Traceback" not in served.printed


def test_a_deadline_before_the_next_start_is_told_at_once(served):
    """Once a start was seen, nobody waits for one that cannot be in time."""
    with Client(served.address) as client:
        ask(client, 0, 4)
        wait_until(lambda: count_of(client) == 0)
        with pytest.raises(TimedOut, match="no executor is there and the next one takes requests in"):
            client.generate("too late", max_output_tokens=4, stream=False, timeout_s=1.0)  # a start takes longer


def explain(file, address):
    """`paceline autoscaler explain`: its exit code and what it printed."""
    path = os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "client")))
    words = [sys.executable, "-m", "paceline_cli", "autoscaler", "explain", str(file), "--scheduler", address]
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200", "NO_COLOR": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    return done.returncode, done.stdout + done.stderr


def test_explains_what_a_file_would_do_now(served, tmp_path):
    """Whoever changes a policy sees first what it would change, and a mistake with its line."""
    file = tmp_path / "other.yaml"
    file.write_text("executors: {min: 0, max: 9}\npolicies:\n  - {kind: threshold, target: 2}\n")
    with Client(served.address) as client, ThreadPoolExecutor(8) as people:
        answers = [people.submit(ask, client, number, 400) for number in range(6)]
        wait_until(lambda: count_of(client) == 2)
        code, printed = explain(file, served.address)
        assert code == 0, printed
        assert re.search(r"threshold requests\s+3\s+requests 6 for \d, target 2 each", printed), printed
        assert re.search(r"wanted\s+3\s+0 to 9 allowed", printed), printed
        file.write_text("executors: {min: 0, max: 9}\npolicies:\n  - {kind: threshold, tarket: 2}\n")
        code, printed = explain(file, served.address)
        assert code == 2
        assert "other.yaml:3: policies.0: 'target' is missing" in printed
        assert [answer.result() for answer in answers] == [400] * 6

    code, printed = explain(file.with_name("scaling.yaml"), "127.0.0.1:1")
    assert code == 3
    assert "127.0.0.1:1 does not tell its load" in printed


def test_a_changed_file_holds_at_once_and_a_wrong_one_never(served, tmp_path):
    """Nobody restarts anything in a rush, and a typing error in a rush does no harm."""
    file = tmp_path / "scaling.yaml"
    with Client(served.address) as client:
        file.write_text(FILE.replace("min: 0", "min: x"))
        wait_until(lambda: "the scaling file is wrong" in served.printed)
        file.write_text(FILE.replace("min: 0", "min: 2"))
        wait_until(lambda: count_of(client) == 2)

    assert "scaling.yaml:2: executors.min" in served.printed


def test_a_wrong_file_and_a_death_together_cost_nobody_an_answer(served, tmp_path):
    """An autoscaler that cannot start is no reason to end those who work; when the file is right again, so is it."""
    file = tmp_path / "scaling.yaml"
    with Client(served.address) as client, ThreadPoolExecutor(8) as people:
        answers = [people.submit(ask, client, number, 300) for number in range(6)]
        wait_until(lambda: count_of(client) == 2)
        file.write_text(FILE + "nonsense: 1\n")
        victim = next(pid for pid in served.child_pids() if " autoscaler " in served.command_of(pid))
        os.kill(victim, signal.SIGKILL)
        assert [answer.result() for answer in answers] == [300] * 6
        assert count_of(client) == 2
        wait_until(lambda: served.printed.count("autoscaler ended with exit code 2") >= 2)
        file.write_text(FILE)
        wait_until(lambda: count_of(client) == 0)

    assert served.process.poll() is None
