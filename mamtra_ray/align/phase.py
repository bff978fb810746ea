"""The alignment as a phase of a run: once for all runs on the same teacher and corpus."""

from __future__ import annotations

from pathlib import Path

from mamtra_ray.align.alignment import align_mixers, library_made_by
from mamtra_ray.artifacts import content_hash
from mamtra_ray.run.session import Session
from mamtra_ray.teacher_cache.shared import SharedCache


def make_library(session: Session, train: SharedCache, validation: SharedCache) -> Path | None:
    """One aligned mixer per layer; the folder of the library. None if the students start otherwise."""
    config = session.config
    if config.student.initialization != "aligned":
        return None
    sharing, teacher = config.student.state_sharing, session.shared_teacher
    made_by = library_made_by(config.align, sharing, teacher.fingerprint, train, config.seed)
    folder = session.shared / f"mixers-{content_hash(made_by)}"
    with session.screen.phase("align", f"every layer's mixer to its attention, into {folder}"):
        align_mixers(
            config.align,
            sharing,
            folder,
            teacher=teacher,
            train=train,
            validation=validation,
            worker=session.worker,
            seed=config.seed,
            on_progress=lambda done, total: session.screen.count(done, total, "tokens"),
        )
    return folder
