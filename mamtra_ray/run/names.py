"""The names of everything in a run folder, and nothing else: light enough for a command line. ::

runs/<name>/
  config.yaml         the resolved search space                          (the only file a run must have)
  identity.json       fingerprints of the teacher and the corpus
  architecture.json   the teacher's shape, for costs in closed form      efficiency.Architecture
  trials.parquet      one row per layout and rung                        rows.TrialRow
  probe.parquet       one row per layout scored by a forward pass        rows.ProbeRow
  curves.parquet      training loss along the way                        rows.CurvePoint
  finalists.parquet   one row per layout that was distilled long         rows.FinalistRow
  reference.json      the teacher's scores, and what the codec costs     Reference
  race.json           which finalists were told apart by further sentences
  environment.json    versions and machine of every session              environment
  trial_failures/     the traceback of every trial that failed, by layout
  costs.json          seconds of every phase; layouts, tokens, FLOPs, bytes of every rung
  audio/index.json    which audio/<system>/<utterance_id>.wav says what  AudioIndex
  best/               the checkpoint; its layout.json says which finalist it is
  report.html
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

CONFIG = "config.yaml"
IDENTITY = "identity.json"
ARCHITECTURE = "architecture.json"
TRIALS = "trials.parquet"
TRIAL_FAILURES = "trial_failures"
PROBE = "probe.parquet"
CURVES = "curves.parquet"
FINALISTS = "finalists.parquet"
FINALIST_RESULTS = "finalists/*/result.json"
REFERENCE = "reference.json"
RACE = "race.json"
COSTS = "costs.json"
AUDIO = "audio"
AUDIO_INDEX = "audio/index.json"
BEST = "best"
EXPORTED_LAYOUT = "layout.json"
"""In ``best/`` and every other exported checkpoint."""
DISTILLED = "train/*/training.json"
"""What a checkpoint of ``python -m mamtra_ray.distill`` is of."""
REPORT = "report.html"
LOCK = ".lock"

CODEC, TEACHER = "codec", "teacher"
"""Systems of the audio that are no student: recordings after a round trip through the codec, and the teacher.
A student's system name is its layout string."""


def student_folder(run_folder: Path, layout: object) -> Path:
    """Where a finalist's distilled student lies."""
    return run_folder / "finalists" / str(layout) / "student"


def best_folder(run_folder: Path, ratio: str, ratios: Sequence[str]) -> Path:
    """Where the best finalist of ``ratio`` is exported: ``best/`` for the first of the search's ratios."""
    return run_folder / (BEST if ratio == ratios[0] else f"{BEST}-{ratio.replace(':', '-')}")


def trial_states(run_folder: Path) -> Path:
    """Where unfinished trials keep their training states, by layout."""
    return run_folder / "trial_states"
