"""Being stopped from outside: Ctrl-C and SIGTERM end a run with one line, code 130 or 143; what is finished is kept.

Ray Tune and Ray Train have handlers of their own, which end ``fit()`` as if all were done, or the process with code 0.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

from mamtra_ray.errors import STOP_SIGNALS, Stopped

Result = TypeVar("Result")
_SECONDS_BETWEEN_LOOKS = 0.2


def take_stop_signals() -> None:
    """From now on SIGINT and SIGTERM raise :class:`~mamtra_ray.errors.Stopped`; call it after ``ray.init``, which takes
    SIGTERM for itself. The decorator of a verb's ``main`` puts back what was there before."""
    if _is_main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, _raise)


def _raise(signum: int, _frame: FrameType | None) -> None:
    # A second signal must not interrupt what the first one ends.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise Stopped(signum)


def run_interruptibly(function: Callable[[], Result], look: Callable[[], None] = lambda: None) -> Result:
    """Run ``fit`` of Ray Tune or Ray Train in a thread and wait for it here, so that it does not take the signals.

    Both set their own handlers, but in the main thread only. A signal leaves the thread behind, which ends with the
    process; so does an error that ``look`` raises, which is called all the while.
    """
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = function()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        look()
        thread.join(_SECONDS_BETWEEN_LOOKS)
    look()
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
