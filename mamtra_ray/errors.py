"""Errors a user can act on: one sentence, exit code 2, no traceback."""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Callable, Iterable


class InputError(Exception):
    """Something the user gave cannot be used. The message says what, where, and what was expected."""


def nearest_name(name: str, valid_names: Iterable[str]) -> str:
    """A hint for a message about an unknown name, e.g. ``did you mean 'front'? (valid: back, front)``."""
    valid = sorted(valid_names)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}(valid: {', '.join(valid)})"


def exit_code_2_on_input_error(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap a verb's ``main``: an :class:`InputError` becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> int:
        try:
            return main(*args, **kwargs) or 0
        except InputError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 2

    return wrapped
