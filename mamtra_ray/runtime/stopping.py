"""Being stopped from outside: Ctrl-C and SIGTERM end a run with one line, code 130 or 143; what is finished is kept.

Ray Tune and Ray Train have handlers of their own, which end ``fit()`` as if all were done, or the process with code 0.
"""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable, Sequence
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
    return run_side_by_side([function], 1, look=look)[0]


def run_side_by_side(
    functions: Sequence[Callable[[], Result]],
    at_once: int,
    on_result: Callable[[int, Result], None] = lambda index, result: None,
    look: Callable[[], None] = lambda: None,
) -> list[Result]:
    """:func:`run_interruptibly` of several functions, so many of them at a time, begun in their order.

    The first error is raised as soon as it is there, and nothing more is begun. What runs beside it is left behind like
    what a signal interrupts: it ends with the process.

    Args:
        functions: what to run.
        at_once: how many at a time.
        on_result: called here, with the place in ``functions``, as soon as each has ended.
        look: called here all the while; an error that it raises is raised.

    Returns:
        The results in the order of ``functions``.
    """
    outcomes: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()

    def run(index: int) -> None:
        try:
            outcomes.put((index, functions[index](), None))
        except BaseException as error:
            outcomes.put((index, None, error))

    results: dict[int, Result] = {}
    begun = 0
    while len(results) < len(functions):
        while begun < len(functions) and begun - len(results) < at_once:
            threading.Thread(target=run, args=(begun,), daemon=True).start()
            begun += 1
        look()
        try:
            index, result, error = outcomes.get(timeout=_SECONDS_BETWEEN_LOOKS)
        except queue.Empty:
            continue
        look()  # what it has to say comes before the error that it led to
        if error is not None:
            raise error
        results[index] = result
        on_result(index, results[index])
    return [results[index] for index in range(len(functions))]


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
