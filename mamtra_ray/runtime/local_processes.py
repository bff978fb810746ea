"""No process of a local Ray cluster outlives the driver that started it by more than seconds, however the driver ends.

Where the kernel ends a process with its parent (Linux), Ray relies on that. It does so for the head and the raylet; the
raylet's agents see that it is gone, and try for a minute to tell a head that is gone too. So a process of ours waits
for the driver's end and ends them. Elsewhere Ray has such a process of its own.

It also says how to go on where the driver cannot: Ray itself ends a driver at once, with code 1 and without a word,
when the raylet beside it has died.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_GRACE_SECONDS = 5.0
"""What ends by itself does so in less."""
_GIVE_UP_SECONDS = 20.0
_GOODBYE = b"goodbye"
_ENDED_BY_FORCE = (
    "\nerror: the process was ended by force (kill -9, out of memory), or by Ray because the raylet of this machine "
    "has died; the same command goes on where it stopped"
)
_watchers: dict[str, subprocess.Popen[bytes]] = {}
"""By session folder. The pipe of each closes with this process, at the latest."""


def end_with_this_process(session_folder: str) -> None:
    """The processes of a Ray session, which this process has started, are ended soon after this process has ended.

    Args:
        session_folder: where they keep their logs open.
    """
    if session_folder in _watchers or not Path("/proc/self/fd").exists():
        return
    # A session of its own: Ctrl-C reaches the driver only. It imports nothing of the package.
    command = [sys.executable, "-I", "-S", __file__, session_folder]
    watcher = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    _watchers[session_folder] = watcher
    atexit.register(_say_goodbye, watcher)


def _say_goodbye(watcher: subprocess.Popen[bytes]) -> None:
    assert watcher.stdin is not None
    with contextlib.suppress(OSError):  # it was killed
        watcher.stdin.write(_GOODBYE)
        watcher.stdin.flush()


def _processes_of(session_folder: str) -> list[int]:
    """Those that Ray has named and that have a file in this folder open. (Ray's names overwrite the environment, in
    which a mark could be.)"""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # another user's, or gone
            if (process / "comm").read_bytes().startswith(b"ray") and any(
                Path(session_folder) in file.readlink().parents for file in (process / "fd").iterdir()
            ):
                found.append(int(process.name))
    return found


def _watch(session_folder: str) -> None:
    if sys.stdin.buffer.read() != _GOODBYE:
        print(_ENDED_BY_FORCE, file=sys.stderr, flush=True)
    # Whoever reads what the driver prints need not wait for what follows.
    os.dup2(sys.stdout.fileno(), sys.stderr.fileno())
    ended = time.monotonic()
    while (seconds := time.monotonic() - ended) < _GIVE_UP_SECONDS and (found := _processes_of(session_folder)):
        if seconds > _GRACE_SECONDS:
            for process in found:
                with contextlib.suppress(OSError):
                    os.kill(process, signal.SIGKILL)
        time.sleep(0.5)


if __name__ == "__main__":
    _watch(sys.argv[1])
