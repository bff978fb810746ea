"""Costs of phases that are killed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from mamtra_ray.errors import DiskFullError
from mamtra_ray.runtime.progress import Costs

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
