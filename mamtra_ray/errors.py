"""Errors a user can act on: one sentence, exit code 2, no traceback."""

from __future__ import annotations

import difflib
import functools
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any


class InputError(Exception):
    """Something the user gave cannot be used. The message says what, where, and what was expected."""


class DivergedError(InputError):
    """A training whose numbers are no longer finite: its learning rate or precision does not do."""


class DiskFullError(InputError):
    """No space is left. Not worth another try, unlike other failures of one trial or worker."""


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal asked for the end. Not an :class:`Exception`, so that nothing takes it for a failure to recover from."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


def stop_behind(error: BaseException) -> Stopped:
    """The signal that ``error`` stands for; one inside a call of Ray becomes a SystemError. Raises any other again."""
    stop = error if isinstance(error, Stopped) else error.__cause__ or error.__context__
    if not isinstance(stop, Stopped):
        raise error
    return stop


Explanation = Callable[[Exception], str | None]
_explanations: dict[str, Explanation] = {}


def explain_also(explanation: Explanation) -> None:
    """From now on a verb ends with the sentence that this function has for an error, if it has one.

    For errors of a library that is imported when it is needed; whoever imports it knows them.
    """
    _explanations[explanation.__qualname__] = explanation


_endings: dict[str, Callable[[], None]] = {}


def end_before_last_words(ending: Callable[[], None]) -> None:
    """From now on :func:`say_last` calls this first: what prints lines of its own must not print after the last one."""
    _endings[ending.__qualname__] = ending


def say_last(text: str) -> None:
    """The last line of a verb that does not end well, on stderr."""
    for ending in _endings.values():
        ending()
    print(text, file=sys.stderr, flush=True)


def nearest_name(name: str, valid_names: Iterable[str]) -> str:
    """A hint for a message about an unknown name, e.g. ``did you mean 'front'? (valid: back, front)``."""
    valid = sorted(valid_names)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}(valid: {', '.join(valid)})"


def exit_code_2_on_input_error(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap a verb's ``main``: an :class:`InputError` or what :func:`explain_also` knows becomes one line on stderr and
    exit code 2, a signal one line and 130 or 143.

    A reader that closes the pipe early (``... | head``) is no error.
    """

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> int:
        handlers = _stop_handlers()
        try:
            code = main(*args, **kwargs) or 0
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            if not _nobody_reads(sys.stdout.fileno()):
                raise  # another pipe broke
            # Python flushes once more at its exit, and would complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except InputError as error:
            # One that Ray brought from a worker has the worker's traceback for its text.
            say_last(f"error: {getattr(error, 'cause', error)}")
            return 2
        except (Stopped, SystemError) as error:
            stop = stop_behind(error)
            say_last(f"\nstopped by {stop}; the same command goes on where it stopped")
            return stop.exit_code
        except KeyboardInterrupt:  # before there was anything to keep
            print("\nstopped", file=sys.stderr, flush=True)
            return 130
        except Exception as error:
            sentences = [text for explain in _explanations.values() if (text := explain(error))]
            if not sentences:
                raise
            say_last(f"error: {sentences[0]}")
            return 2
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)

    return wrapped


def _stop_handlers() -> dict[int, Any]:
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}


def _nobody_reads(pipe: int) -> bool:
    poll = select.poll()
    poll.register(pipe, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))
