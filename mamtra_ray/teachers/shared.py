"""How a teacher reaches the workers: through Ray's object store. No worker needs the checkpoint's files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray

from mamtra_ray.teachers.teacher import Teacher

_OF_THIS_PROCESS: dict[str, Teacher] = {}


@dataclass(frozen=True)
class SharedTeacher:
    """A teacher in the object store."""

    fingerprint: str
    reference: tuple[Any, ...]
    """Of the :class:`Teacher`; in a tuple, so that Ray hands it on as it is instead of the teacher."""

    def load(self) -> Teacher:
        """The teacher, read once per process: workers are reused for many layouts. On the CPU at first."""
        if self.fingerprint not in _OF_THIS_PROCESS:
            _OF_THIS_PROCESS.clear()  # not two teachers at once in memory
            _OF_THIS_PROCESS[self.fingerprint] = ray.get(self.reference[0])
        return _OF_THIS_PROCESS[self.fingerprint]


def share_teacher(teacher: Teacher) -> SharedTeacher:
    """Put ``teacher`` into the object store; Ray must be initialized."""
    return SharedTeacher(teacher.fingerprint, (ray.put(teacher),))
