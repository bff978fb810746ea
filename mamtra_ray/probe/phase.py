"""The probe as a phase of a run."""

from __future__ import annotations

from pathlib import Path

from mamtra_ray.layouts.candidates import given_candidates
from mamtra_ray.probe.pool import ProbeData
from mamtra_ray.probe.probing import outcome_table, probe_layouts
from mamtra_ray.run.rows import ProbeRow
from mamtra_ray.run.session import Session
from mamtra_ray.teacher_cache.shared import SharedCache


def probe_data(session: Session, library: Path, validation: SharedCache) -> ProbeData:
    """What this run's layouts are scored with."""
    config = session.config
    return ProbeData(
        session.shared_teacher, library, config.student.state_sharing, validation, config.probe.validation_tokens
    )


def run_probe(session: Session, library: Path, validation: SharedCache) -> list[ProbeRow]:
    """Score layouts and say what came of it."""
    config = session.config
    given = given_candidates(session.space, config.search.strategies, config.search.layouts)
    with session.screen.phase("probe", f"at most {config.probe.num_layouts} layouts by forward passes"):
        session.screen.now("starting actors that load the teacher and its mixers")
        rows = probe_layouts(
            config.probe,
            session.space,
            [candidate.layout for candidate in given],
            session.folder,
            probe_data(session, library, validation),
            session.worker,
            seed=config.seed,
            on_progress=lambda done, total: session.screen.count(done, total, "layouts"),
        )
        session.screen.now("fitting the surrogate to the scores")
        session.screen.say(outcome_table(session.space, rows, config.seed))
    return rows
