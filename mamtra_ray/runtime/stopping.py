"""Being stopped from outside: Ctrl-C and SIGTERM end a run with one line, code 130 or 143; what is finished is kept.

Ray Tune and Ray Train have handlers of their own, which end ``fit()`` as if all were done, or the process with code 0.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import ray

from mamtra_ray.errors import STOP_SIGNALS, Stopped

Result = TypeVar("Result")
_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_TO_UNWIND = 10.0


def take_stop_signals() -> None:
    """From now on SIGINT and SIGTERM raise :class:`~mamtra_ray.errors.Stopped`; call it after ``ray.init``, which takes
    SIGTERM for itself. The decorator of a verb's ``main`` puts back what was there before."""
    # Tune's handler ends `fit()` without an exception; this is its documented switch.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    if _is_main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, _raise)


def _raise(signum: int, _frame: FrameType | None) -> None:
    # A second signal must not interrupt what the first one ends.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise Stopped(signum)


def run_interruptibly(function: Callable[[], Result]) -> Result:
    """Run ``function`` in a thread and wait for it here, so that a signal finds Python code and not Ray's.

    A signal inside a call of Ray becomes a SystemError there; and Ray Train sets its own handler where it is called in
    the main thread, and leaves it. When a signal comes, Ray is shut down, which ends what the thread waits for; so its
    phases note their seconds before :class:`~mamtra_ray.errors.Stopped` goes on.
    """
    if not _is_main_thread():
        return function()
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = function()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            # Again and again: ray.init, which the thread calls, puts a handler in C++ in their place.
            take_stop_signals()
            thread.join(_SECONDS_BETWEEN_LOOKS)
    except Stopped:
        ray.shutdown()
        thread.join(_SECONDS_TO_UNWIND)
        raise
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
