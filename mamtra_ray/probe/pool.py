"""Ray actors that score layouts by forward passes, and the table ``probe.parquet`` of what they found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from mamtra_ray.align.mixer_library import MANIFEST, load_library
from mamtra_ray.artifacts import content_hash, file_hash
from mamtra_ray.layouts import Layout
from mamtra_ray.models.mamba import StateSharing
from mamtra_ray.probe.layout_scoring import LayoutScorer, cosine_importance
from mamtra_ray.run.memory import PROBE_BATCH_TOKENS
from mamtra_ray.run.names import PROBE
from mamtra_ray.run.rows import ProbeRow, read_table, write_table
from mamtra_ray.runtime.actor_pool import ActorPool
from mamtra_ray.runtime.device import device_of_this_process
from mamtra_ray.runtime.resources import WorkerResources
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.teacher_cache.batches import DistillBatch, batches
from mamtra_ray.teacher_cache.shared import SharedCache
from mamtra_ray.teachers.shared import SharedTeacher

# Layouts a task scores: many share more prefixes, few lose less on a kill and spread better.
_LAYOUTS_PER_TASK = 8


@dataclass(frozen=True)
class ProbeData:
    """What layouts are scored with."""

    teacher: SharedTeacher
    library: Path
    """Folder of the mixer library."""
    state_sharing: StateSharing
    validation: SharedCache
    validation_tokens: int
    """The first utterances that hold this many speech tokens are used."""


class ProbePool:
    """Ray actors that hold teacher and library once, and the table of what they found.

    ``rows`` are the scores made with this data; rows of others stay in the file and are left alone.
    """

    def __init__(self, data: ProbeData, folder: Path, worker: WorkerResources) -> None:
        teacher = data.teacher.load()
        # Checked here, so that a wrong library is one sentence and no actor's traceback.
        mixers = load_library(data.library, teacher_fingerprint=teacher.fingerprint)
        all_mamba = Layout.all_mamba(teacher.model.config.num_layers)
        make_student(teacher.model, all_mamba, "aligned", mixers, data.state_sharing, share_weights=True)
        self.path = folder / PROBE
        held_out = first_utterances(data.validation, data.validation_tokens)
        self.made_by = content_hash(
            {
                "teacher": teacher.fingerprint,
                "library": file_hash(data.library / MANIFEST),
                "corpus": data.validation.manifest.made_by,
                "speech_tokens": held_out.speech_tokens,
            }
        )
        # Readers of the run folder take the data of the last row for the present one.
        self._table = sorted(read_table(self.path, ProbeRow), key=lambda row: row.made_by == self.made_by)
        self.rows = {row.layout: row for row in self._table if row.made_by == self.made_by}
        if self.rows and len(self.rows) < len(self._table):
            write_table(self.path, self._table, ProbeRow)
        self._pool = ActorPool(
            ProbeActor,
            (replace(data, library=data.library.resolve(), validation=held_out),),
            worker.options(),
            max(1, worker.slots(ray.cluster_resources())),
        )

    def __enter__(self) -> ProbePool:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.__exit__()

    def score(self, layouts: Sequence[Layout], layouts_per_task: int = _LAYOUTS_PER_TASK) -> Iterator[int]:
        """Score new layouts; yields how many are done whenever some are in the file."""
        # Sorted, so that the layouts of a task share long prefixes.
        ordered = sorted(set(layouts))
        tasks = [ordered[first : first + layouts_per_task] for first in range(0, len(ordered), layouts_per_task)]
        done = 0
        for _, rows in self._pool.map_unordered(lambda actor, task: actor.score.remote(task), tasks):
            self._append(rows)
            done += len(rows)
            yield done

    def cosine_importance(self) -> list[float]:
        """See :func:`~mamtra_ray.probe.layout_scoring.cosine_importance`."""
        [(_, scores)] = self._pool.map_unordered(lambda actor, _: actor.cosine_importance.remote(), [None])
        return scores

    def _append(self, rows: Sequence[ProbeRow]) -> None:
        rows = [replace(row, made_by=self.made_by) for row in rows]
        self.rows |= {row.layout: row for row in rows}
        self._table += rows
        write_table(self.path, self._table, ProbeRow)


class ProbeActor:
    """Holds the scorer and the held-out batches."""

    def __init__(self, data: ProbeData) -> None:
        self.data = data
        self.scorer: Any = None

    def prepare(self) -> None:
        """Load teacher, library and batches."""
        if self.scorer is not None:
            return
        device = device_of_this_process()
        teacher = self.data.teacher.load()
        library = load_library(self.data.library, teacher_fingerprint=teacher.fingerprint)
        shared = self.data.teacher
        self.scorer = LayoutScorer(
            shared.model_on(device), library, self.data.state_sharing, device, shared.cpu_offload
        )
        size = PROBE_BATCH_TOKENS
        self.batches: list[DistillBatch] = list(
            batches(self.data.validation, teacher.sequence, tokens_per_batch=size, seed=0, epoch=0, device=device)
        )

    def score(self, layouts: Sequence[Layout]) -> list[ProbeRow]:
        """One row per layout, in their order."""
        self.prepare()
        return self.scorer.score(layouts, self.batches)

    def cosine_importance(self) -> list[float]:
        """One score per layer."""
        self.prepare()
        return cosine_importance(self.scorer.teacher, self.batches)


def first_utterances(shared: SharedCache, speech_tokens: int) -> SharedCache:
    """The first utterances of a split that together hold at most so many speech tokens, one at least."""
    count = max(1, int(np.searchsorted(np.cumsum(shared.num_speech), speech_tokens, side="right")))
    columns = ("block_of_row", "row_in_block", "num_text", "num_speech")
    return replace(shared, **{name: getattr(shared, name)[:count] for name in columns})
