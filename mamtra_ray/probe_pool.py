"""Ray actors that score layouts by forward passes, and the table ``probe.parquet`` of what they found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from mamtra_ray.artifacts import content_hash, file_hash
from mamtra_ray.config import Config
from mamtra_ray.layouts import Layout
from mamtra_ray.mask_scoring import MaskScorer, ProbeRow, cosine_importance
from mamtra_ray.mixer_library import MANIFEST, load_library
from mamtra_ray.run_folder import PROBE, PROBE_COLUMNS, read_rows, write_rows
from mamtra_ray.shared_batches import DistillBatch, batches
from mamtra_ray.shared_cache import SharedCache
from mamtra_ray.teachers.base import Teacher, make_student

# Layouts a task scores: many share more prefixes, few lose less on a kill and spread better.
_LAYOUTS_PER_TASK = 8
_BATCH_TOKENS = 4_096


@dataclass(frozen=True)
class _Job:
    config: Config
    teacher: Any
    library: str
    validation: SharedCache


class ProbePool:
    """Ray actors that hold teacher and library once, and the table of what they found.

    ``rows`` are the scores made under these settings; rows of others stay in the file and are left alone.
    """

    def __init__(self, config: Config, folder: Path, teacher: Teacher, library: Path, validation: SharedCache) -> None:
        # Checked here, so that a wrong library is one sentence and no actor's traceback.
        mixers = load_library(library, teacher_fingerprint=teacher.fingerprint)
        pure_mamba = "M" * teacher.model.config.num_layers
        make_student(teacher.model, pure_mamba, "aligned", mixers, config.student.state_sharing, share_weights=True)
        self.config, self.path = config, folder / PROBE
        held_out = first_utterances(validation, config.probe.validation_tokens)
        self.made_by = content_hash(
            {
                "teacher": teacher.fingerprint,
                "library": file_hash(library / MANIFEST),
                "corpus": validation.manifest.made_by,
                "speech_tokens": held_out.speech_tokens,
            }
        )
        # Readers of the run folder take the settings of the last row for the present ones.
        self._table = sorted(
            read_rows(self.path, (*PROBE_COLUMNS, "made_by")), key=lambda row: row["made_by"] == self.made_by
        )
        self.rows = {
            Layout(row["layout"]): ProbeRow(Layout(row["layout"]), row["ce"], row["kl"], row["tokens"], row["seconds"])
            for row in self._table
            if row["made_by"] == self.made_by
        }
        if self.rows and len(self.rows) < len(self._table):
            self._write()
        self._job = _Job(config, [ray.put(teacher)], str(library.resolve()), held_out)
        self._actors: list[Any] = []

    def __enter__(self) -> ProbePool:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def score(self, layouts: Sequence[Layout], layouts_per_task: int = _LAYOUTS_PER_TASK) -> Iterator[int]:
        """Score new layouts; yields how many are done whenever some are in the file."""
        # Sorted, so that the layouts of a task share long prefixes.
        ordered = sorted(set(layouts))
        tasks = [ordered[first : first + layouts_per_task] for first in range(0, len(ordered), layouts_per_task)]
        self._start_actors(len(tasks))
        done = 0
        running = {}
        for actor in self._actors:
            if tasks:
                running[actor.score.remote(tasks.pop(0))] = actor
        while running:
            [finished], _ = ray.wait(list(running), num_returns=1)
            actor = running.pop(finished)
            rows: list[ProbeRow] = ray.get(finished)
            if tasks:
                running[actor.score.remote(tasks.pop(0))] = actor
            self._append(rows)
            done += len(rows)
            yield done

    def cosine_importance(self) -> list[float]:
        """See :func:`~mamtra_ray.mask_scoring.cosine_importance`."""
        self._start_actors(1)
        return ray.get(self._actors[0].cosine_importance.remote())

    def _start_actors(self, useful: int) -> None:
        cpus, gpus = self.config.search.cpus_per_worker, self.config.search.gpus_per_worker or 0
        resources = ray.cluster_resources()
        possible = int(resources.get("CPU", 1) // cpus)
        if gpus:
            possible = min(possible, int(resources.get("GPU", 0) // gpus))
        for _ in range(len(self._actors), min(max(possible, 1), useful)):
            options = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 3, "max_task_retries": 3}
            self._actors.append(_ProbeActor.options(**options).remote(self._job))  # type: ignore[attr-defined]

    def _append(self, rows: Sequence[ProbeRow]) -> None:
        for row in rows:
            self.rows[row.layout] = row
            content = {**vars(row), "layout": str(row.layout), "ratio": row.layout.ratio, "made_by": self.made_by}
            self._table.append(content)
        self._write()

    def _write(self) -> None:
        write_rows(self.path, self._table, (*PROBE_COLUMNS, "made_by"))


@ray.remote
class _ProbeActor:
    """Holds the scorer and the held-out batches."""

    def __init__(self, job: _Job) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        teacher: Teacher = ray.get(job.teacher[0])
        library = load_library(Path(job.library), teacher_fingerprint=teacher.fingerprint)
        self.scorer = MaskScorer(teacher.model, library, job.config.student.state_sharing, device)
        self.batches: list[DistillBatch] = list(
            batches(job.validation, teacher.sequence, batch_tokens=_BATCH_TOKENS, seed=0, epoch=0, device=device)
        )

    def score(self, layouts: Sequence[Layout]) -> list[ProbeRow]:
        return self.scorer.score(layouts, self.batches)

    def cosine_importance(self) -> list[float]:
        return cosine_importance(self.scorer.teacher, self.batches)


def first_utterances(shared: SharedCache, speech_tokens: int) -> SharedCache:
    """The first utterances of a split that together hold at most so many speech tokens, one at least."""
    count = max(1, int(np.searchsorted(np.cumsum(shared.num_speech), speech_tokens, side="right")))
    columns = ("block_of_row", "row_in_block", "num_text", "num_speech")
    return replace(shared, **{name: getattr(shared, name)[:count] for name in columns})
