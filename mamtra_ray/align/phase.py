"""The alignment as a phase of a run: once for all runs on the same teacher and corpus."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from mamtra_ray.align.alignment import align_mixers, library_made_by
from mamtra_ray.align.mixer_library import MANIFEST
from mamtra_ray.artifacts import content_hash, disk_full_is_said
from mamtra_ray.run.names import LOCK
from mamtra_ray.run.session import Session
from mamtra_ray.teacher_cache.shared import SharedCache


@contextlib.contextmanager
def one_writer(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Wait while another process trains this library, and keep others out of it; a finished one needs no lock."""
    if (folder / MANIFEST).exists():
        yield
        return
    with disk_full_is_said(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say("    another process trains these mixers: waiting for it")
            lock.acquire(poll_interval=0.5)
    try:
        yield
    finally:
        lock.release()


def make_library(session: Session, train: SharedCache, validation: SharedCache) -> Path | None:
    """One aligned mixer per layer; the folder of the library. None if the students start otherwise."""
    config = session.config
    if config.student.initialization != "aligned":
        return None
    sharing, teacher = config.student.state_sharing, session.shared_teacher
    made_by = library_made_by(config.align, sharing, teacher.fingerprint, train, config.seed)
    folder = session.shared / f"mixers-{content_hash(made_by)}"
    screen = session.screen

    def say(line: str) -> None:
        screen.say(line)
        screen.now("waiting for the other process")

    with screen.phase("align", f"every layer's mixer to its attention, into {folder}"), one_writer(folder, say):
        align_mixers(
            config.align,
            sharing,
            folder,
            teacher=teacher,
            train=train,
            validation=validation,
            worker=session.worker,
            seed=config.seed,
            on_progress=lambda done, total: screen.count(done, total, "tokens"),
            on_activity=screen.now,
        )
    return folder
