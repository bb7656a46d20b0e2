"""Where the seconds of a start go, for whoever finds it slow."""

import json
import subprocess
import sys
import time

from common.logs import configure_logs
from executor_svc.start_times import StartTimes


def test_every_second_of_a_start_belongs_to_a_phase(capsys):
    """Phases come back (a model is loaded for its test, and again to be packed), and imports come before them all."""
    configure_logs("executor", "info")
    now, seen = [100.0], []
    times = StartTimes(lambda *told: seen.append(told), age_s=lambda: 2.0, clock=lambda: now[0])
    for phase, seconds in (
        ("reading the configuration", 1.0),
        ("testing the model", 0.5),
        ("packing the weights", 0.25),
        ("recording mixed steps of 512 tokens", 0.03125),
        ("recording decoding steps of 64 tokens", 0.03125),
        ("testing the model", 0.125),
        ("ready", 0.0625),
    ):
        times(phase, 0.5)
        now[0] += seconds
    times.log()

    assert seen[0] == ("reading the configuration", 0.5)
    assert times.seconds == {
        "imports_s": 2.0,
        "configuration_s": 1.0,
        "self_test_s": 0.625,
        "packing_s": 0.25,
        "recording_s": 0.0625,
        "listening_s": 0.0625,
    }
    line = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert (line["event"], line["seconds"], line["packing_s"]) == ("executor started", 4.0, 0.25)


def test_the_age_of_a_process_counts_from_its_creation():
    """Importing takes most of a start; a clock that begins after it would hide that."""
    before = time.monotonic()
    script = "from executor_svc.machine import process_age_s; print(process_age_s())"
    age = float(subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, timeout=60).stdout)

    assert 0 < age <= time.monotonic() - before + 0.02  # the system counts in hundredths
