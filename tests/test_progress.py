"""Costs of phases that are killed; what a phase says while it runs, on a clock that the test moves."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from mamtra_ray.errors import DiskFullError
from mamtra_ray.runtime import progress
from mamtra_ray.runtime.pace import Pace
from mamtra_ray.runtime.progress import Costs, Screen, said_while

KILLED_IN_A_PHASE = """
import os, signal, sys, time
from pathlib import Path
from mamtra_ray.runtime import progress
progress.SECONDS_BETWEEN_NOTES = 0.1
costs = progress.Costs(Path(sys.argv[1]))
with costs.timed("align"):
    print("begun", flush=True)
    time.sleep(100)
"""


def test_a_killed_phase_keeps_its_seconds_over_all_sessions(tmp_path):
    path = tmp_path / "costs.json"
    lived = []
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", KILLED_IN_A_PHASE, str(path)], stdout=subprocess.PIPE)
        process.stdout.readline()
        began = time.monotonic()
        before = json.loads(path.read_text())["phases"]["align"]["seconds"] if path.exists() else 0.0
        while not path.exists() or json.loads(path.read_text())["phases"]["align"]["seconds"] < before + 0.5:
            assert time.monotonic() < began + 60, "a phase that goes on is noted"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        lived.append(time.monotonic() - began)
    kept = Costs(path).phases["align"]["seconds"]
    assert 1.0 <= kept <= sum(lived) + 0.1
    costs = Costs(path)
    with costs.timed("align"):
        costs.add("align", padding="1 %")
    assert costs.phases["align"]["padding"] == "1 %"
    assert kept <= Costs(path).phases["align"]["seconds"] < kept + 60


def test_on_a_full_disk_the_phase_says_what_it_could_not_write(tmp_path, monkeypatch):
    def full(*_):
        raise DiskFullError("no space left to write costs.json")

    costs = Costs(tmp_path / "costs.json")
    monkeypatch.setattr("mamtra_ray.runtime.progress.write_checked_json", full)
    with pytest.raises(DiskFullError, match="checkpoint"), costs.timed("align"):
        raise DiskFullError("no space left to write checkpoint")
    with pytest.raises(DiskFullError, match="costs"), costs.timed("align"):
        pass


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock(monkeypatch):
    # The screen's own thread would look at this clock whenever it likes.
    monkeypatch.setattr(progress, "repeatedly", lambda *_: contextlib.nullcontext())
    return Clock()


def screen_of(tmp_path, clock, *phases):
    return Screen(phases, Costs(tmp_path / "costs.json"), clock)


def test_the_time_left_is_that_of_the_latest_steps(tmp_path, clock, capsys):
    """The case that was reported: four silent minutes, then eight minutes of training. It said 2:26:43."""
    screen = screen_of(tmp_path, clock, "align")
    with screen.phase("align", "30 mixers"):
        clock.seconds += 240
        capsys.readouterr()
        screen.count(0, 48_000, "tokens")
        for step in range(1, 31):  # 100 tokens each second
            clock.seconds += 1
            screen.count(100 * step, 48_000, "tokens")
        last = capsys.readouterr().out.splitlines()[-1]
        assert last == "    2,700/48,000 tokens  100/s  7:33 left"  # said when nine seconds had passed again
        for step in range(31, 241):  # a third of it
            clock.seconds += 3
            screen.count(100 * step, 48_000, "tokens")
        last = capsys.readouterr().out.splitlines()[-1]
        assert last == "    23,900/48,000 tokens  33/s  12:03 left", "of the last minute, not of the average"


def test_what_an_earlier_session_did_is_no_speed():
    pace = Pace()
    pace.note(1_000_000, 0.0)
    assert pace.per_second is None and pace.seconds_left(2_000_000, 0.0) is None
    pace.note(1_000_100, 10.0)
    assert pace.per_second == 10 and pace.seconds_left(1_000_200, 10.0) == 10
    # Repeated from a table, in no time; then a worker that goes on from an older checkpoint.
    pace.note(1_500_000, 10.1, is_work=False)
    pace.note(1_400_000, 500.0)
    assert pace.per_second == 10 and pace.seconds_left(1_400_100, 500.0) == 10


def test_slow_steps_count_down_and_a_stall_is_said():
    pace = Pace()
    for step in range(12):  # one trial in five minutes
        pace.note(step, 300.0 * step)
    now = 300.0 * 11
    assert [pace.seconds_left(14, now + passed) for passed in (0, 100, 300, 900)] == pytest.approx([900, 800, 600, 600])
    assert [pace.seconds_without_news(now + passed) for passed in (0, 300, 900, 901)] == [0, 0, 0, 901]
    # Steps of a second are late after half a minute.
    fast = Pace()
    for step in range(100):
        fast.note(step, float(step))
    assert [fast.seconds_without_news(99.0 + passed) for passed in (10, 30, 31)] == [0, 0, 31]


@pytest.mark.parametrize("silent", [False, True])
def test_no_phase_is_silent_for_more_than_ten_seconds_and_it_names_what_it_does(tmp_path, clock, capsys, silent):
    """Whatever a phase does: with a beat every second there is a line at least every ten."""
    screen = screen_of(tmp_path, clock, "distill", "report")
    said = []  # (second, line)

    def pass_seconds(count, each=lambda second: None):
        for second in range(count):
            clock.seconds += 1
            each(second)
            screen.beat()
            said.extend((clock.seconds, line) for line in capsys.readouterr().out.splitlines())

    with screen.phase("distill", "AMAM"):
        said.extend((clock.seconds, line) for line in capsys.readouterr().out.splitlines())
        if not silent:
            screen.now("starting workers")
        pass_seconds(25)
        if not silent:
            screen.now("measuring", 0.25)
            pass_seconds(12)
            pass_seconds(30, lambda second: screen.count(10 * second, 300, "tokens", "AMAM"))
            pass_seconds(60)
            screen.now("saving")
            pass_seconds(12)
            pass_seconds(2, lambda second: screen.count(300, 300, "tokens"))
            pass_seconds(20)
    times = [second for second, _ in said]
    assert max(b - a for a, b in itertools.pairwise(times)) <= 10
    lines = [line for _, line in said]
    if silent:
        assert lines[1:] == ["    distill, 0:09", "    distill, 0:18"]
        return
    for expected in (
        "    starting workers, 0:09",
        "    measuring, 25%, 0:11",
        "    290/300 tokens  10/s  0:00 left  (nothing new for 0:32)  AMAM",
        "    290/300 tokens  saving, 0:08",
        "    300/300 tokens",
        "    finishing, 0:09",
    ):
        assert expected in lines, lines
    assert screen.progress() == ("", None, None)


def test_on_a_terminal_one_line_is_redrawn_and_never_wraps(tmp_path, clock, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    screen = screen_of(tmp_path, clock, "trials")
    with screen.phase("trials", "9 layouts"):
        capsys.readouterr()
        for second in range(4):
            clock.seconds += 1
            screen.count(second, 9, "trials", "best CE 1.234 " + "AM" * 40)
        drawn = capsys.readouterr().out.split("\r\033[K")[1:]
        assert len(drawn) == 4 and all(len(line) == 39 and "\n" not in line for line in drawn)
        assert screen.progress() == ("trials", 3 / 9, None)


def test_before_the_first_phase_a_long_wait_is_said(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_LONGEST_SILENCE", 0.01)
    with said_while("connecting to Ray"):
        began = time.monotonic()
        said = ""
        while "connecting to Ray, 0:00\n" not in said and time.monotonic() < began + 60:
            said += capsys.readouterr().out
    assert said.startswith("    connecting to Ray, 0:0")
