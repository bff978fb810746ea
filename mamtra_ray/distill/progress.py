"""How far trainings in other processes are."""

from __future__ import annotations

from typing import Any

import ray

from mamtra_ray.distill.job import DistillJob
from mamtra_ray.runtime.actor_pool import result_of
from mamtra_ray.runtime.progress import Screen


class TrainingProgress:
    """What trainings told last, by layout; a Ray actor."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, str]] = {}
        self._sentences: list[str] = []

    def say(self, sentence: str) -> None:
        """A training has something to say that should stay on the screen."""
        self._sentences.append(sentence)

    def new_sentences(self) -> list[str]:
        """What was said since the last call."""
        sentences, self._sentences = self._sentences, []
        return sentences

    def note_progress(self, layout: str, tokens: int, doing: str = "") -> None:
        """A training tells how many tokens it has seen, and what it is doing if that is no training step."""
        self._last[layout] = tokens, doing

    def progress_of(self, layout: str) -> tuple[int, str]:
        """What the training of ``layout`` told last; nothing yet: it is being started."""
        return self._last.get(layout, (0, "starting workers"))

    def running(self) -> dict[str, tuple[int, str]]:
        """What all trainings that have not ended told last."""
        return dict(self._last)

    def end_progress(self, layout: str) -> None:
        """The training of ``layout`` has ended, or begins anew."""
        self._last.pop(layout, None)


def start_progress() -> Any:
    """The actor, for ``DistillJob.progress``."""
    return ray.remote(num_cpus=0)(TrainingProgress).remote()  # type: ignore[attr-defined]


def show_progress(
    screen: Screen, job: DistillJob, *, before: int = 0, total: int | None = None, note: str = ""
) -> None:
    """Put what the training of ``job`` told last on the screen.

    Args:
        screen: of the session, in the phase of the training.
        job: whose ``progress`` is asked.
        before: tokens of this phase's earlier trainings.
        total: of all its trainings; None: of this one alone.
        note: more words.
    """
    for sentence in result_of(job.progress.new_sentences.remote()):
        screen.say(f"    {sentence}")
    of_this = job.report_at[-1]
    tokens, doing = result_of(job.progress.progress_of.remote(str(job.layout)))
    if doing:
        screen.now(f"{note}  {doing}" if note else doing)
    else:
        screen.count(before + min(tokens, of_this), of_this if total is None else total, "tokens", note)
