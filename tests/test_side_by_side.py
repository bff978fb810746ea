"""Several functions beside each other: their order, how many at a time, and what an error or a signal does."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from mamtra_ray.runtime.resources import WorkerResources
from mamtra_ray.runtime.stopping import run_side_by_side
from mamtra_ray.search.finalists import trainings_at_once


def test_results_keep_the_order_and_never_more_run_than_allowed():
    lock, running, most, told = threading.Lock(), [0], [0], []

    def function(index):
        def run():
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
            time.sleep(0.02 * (5 - index))  # the first ends last
            with lock:
                running[0] -= 1
            return index * index

        return run

    results = run_side_by_side([function(i) for i in range(5)], 2, lambda index, result: told.append((index, result)))
    assert results == [0, 1, 4, 9, 16]
    assert most[0] == 2
    assert sorted(told) == [(i, i * i) for i in range(5)]
    assert run_side_by_side([], 3) == []


def test_all_wait_for_each_other_only_where_they_run_side_by_side():
    """Two functions that each need the other to have begun: one after the other they could never end."""
    barrier = threading.Barrier(2, timeout=20)
    assert sorted(run_side_by_side([barrier.wait, barrier.wait], 2)) == [0, 1]


def test_an_error_is_raised_at_once_and_nothing_more_is_begun():
    begun, never = [], threading.Event()

    def fails():
        begun.append("fails")
        raise KeyError("of the second one")

    def waits():
        begun.append("waits")
        never.wait(60)

    with pytest.raises(KeyError, match="of the second one"):
        run_side_by_side([waits, fails, lambda: begun.append("third")], 2)
    assert sorted(begun) == ["fails", "waits"]
    never.set()


def test_a_signal_ends_the_process_while_several_run():
    program = (
        "import os, signal, threading\n"
        "from mamtra_ray.errors import Stopped\n"
        "from mamtra_ray.runtime.stopping import run_side_by_side, take_stop_signals\n"
        "take_stop_signals()\n"
        "def kill(): os.kill(os.getpid(), signal.SIGTERM); threading.Event().wait()\n"
        "try:\n"
        "    run_side_by_side([kill, threading.Event().wait], 2)\n"
        "except Stopped as stopped:\n"
        "    print('stopped with', stopped.exit_code)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ended.stdout == f"stopped with {128 + signal.SIGTERM}\n", ended.stderr


@pytest.mark.parametrize(
    ("worker", "workers", "cluster", "at_once"),
    [
        (WorkerResources(1, 0), 1, {"CPU": 2.0}, 2),
        (WorkerResources(1, 0), 2, {"CPU": 2.0}, 1),
        (WorkerResources(1, 1), 4, {"CPU": 64.0, "GPU": 8.0}, 2),
        (WorkerResources(8, 1), 1, {"CPU": 16.0, "GPU": 8.0}, 2),
        (WorkerResources(1, 1), 4, {"CPU": 64.0, "GPU": 2.0}, 1),
    ],
)
def test_as_many_trainings_run_as_the_cluster_has_room_for(worker, workers, cluster, at_once):
    assert trainings_at_once(worker, workers, cluster) == at_once
