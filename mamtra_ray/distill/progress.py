"""How far trainings in other processes are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
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

    def running(self) -> dict[str, tuple[int, str]]:
        """What all trainings that have not ended told last."""
        return dict(self._last)

    def end_progress(self, layout: str) -> None:
        """The training of ``layout`` has ended, or begins anew."""
        self._last.pop(layout, None)


def start_progress() -> Any:
    """The actor, for ``DistillJob.progress``."""
    return ray.remote(num_cpus=0)(TrainingProgress).remote()  # type: ignore[attr-defined]


def show_progress(screen: Screen, job: DistillJob) -> None:
    """Put what the training of ``job`` told last on the screen, in the phase of this one training."""
    show_progress_of_several(screen, job.progress, [str(job.layout)], finished=set(), tokens=job.report_at[-1])


def show_progress_of_several(
    screen: Screen, progress: Any, layouts: Sequence[str], *, finished: Collection[str], tokens: int
) -> None:
    """Put how far trainings are on the screen: their tokens, or what they do as long as none of them trains.

    Args:
        screen: of the session, in the phase of the trainings.
        progress: handle of an actor that is a :class:`TrainingProgress`.
        layouts: of all trainings of the phase.
        finished: those that have ended.
        tokens: of each training.
    """
    for sentence in result_of(progress.new_sentences.remote()):
        screen.say(f"    {sentence}")
    running = {name: told for name, told in result_of(progress.running.remote()).items() if name in layouts}
    # One that has ended may still stand in the actor.
    running = {name: told for name, told in running.items() if name not in finished}
    doing = {name: what for name, (_, what) in running.items()}
    if all(doing.values()):
        screen.now("; ".join(f"{name}  {what}" for name, what in doing.items()) or "starting workers")
        return
    done = len(finished) * tokens + sum(min(seen, tokens) for seen, _ in running.values())
    note = " and ".join(running) if len(running) <= 2 else f"{len(running)} trainings side by side"
    if len(layouts) == 1:
        note = ""
    screen.count(done, tokens * len(layouts), "tokens", note)
