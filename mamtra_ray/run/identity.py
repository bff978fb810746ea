"""Which teacher and corpus the results of a run were made from."""

from __future__ import annotations

from pathlib import Path

from mamtra_ray.artifacts import read_manifest, write_manifest
from mamtra_ray.errors import InputError
from mamtra_ray.run.names import FINALIST_RESULTS, IDENTITY, TRIALS

_SCHEMA_VERSION = 1


def check_identity(folder: Path, teacher_fingerprint: str, corpus_hash: str) -> None:
    """Note the run's teacher and corpus, and refuse others where results are there already.

    Raises:
        InputError: trials or finalists of another teacher or corpus.
    """
    path = folder / IDENTITY
    now = {"teacher": teacher_fingerprint, "corpus": corpus_hash}
    if path.exists():
        before = read_manifest(path, "run", _SCHEMA_VERSION)["made_by"]
        if before == now:
            return
        if (folder / TRIALS).exists() or any(folder.glob(FINALIST_RESULTS)):
            other = next(key for key in now if before.get(key) != now[key])
            raise InputError(
                f"{folder} has results of another {other} (its fingerprint was {str(before.get(other))[:16]}, now "
                f"{now[other][:16]}): set {other}.path back, or begin another run with --run and --space"
            )
    write_manifest(path, "run", _SCHEMA_VERSION, now)
