"""How a teacher reaches the workers: through Ray's object store. No worker needs the checkpoint's files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
import torch

from mamtra_ray.speech_lm.offloading import with_layers_on_cpu
from mamtra_ray.speech_lm.speech_lm import SpeechLM
from mamtra_ray.teachers.teacher import Teacher

_OF_THIS_PROCESS: dict[str, Teacher] = {}


@dataclass(frozen=True)
class SharedTeacher:
    """A teacher in the object store."""

    fingerprint: str
    reference: tuple[Any, ...]
    """Of the :class:`Teacher`; in a tuple, so that Ray hands it on as it is instead of the teacher."""
    cpu_offload: bool = False
    """``teacher.cpu_offload``."""

    def load(self) -> Teacher:
        """The teacher, read once per process: workers are reused for many layouts. On the CPU at first."""
        if self.fingerprint not in _OF_THIS_PROCESS:
            _OF_THIS_PROCESS.clear()  # not two teachers at once in memory
            _OF_THIS_PROCESS[self.fingerprint] = ray.get(self.reference[0])
        return _OF_THIS_PROCESS[self.fingerprint]

    def model_on(self, device: torch.device) -> SpeechLM:
        """Its model for forward passes on ``device``, where all of it is, or with ``cpu_offload`` a layer at a time."""
        model = self.load().model
        return with_layers_on_cpu(model, device) if self.cpu_offload else model.to(device)


def share_teacher(teacher: Teacher, *, cpu_offload: bool = False) -> SharedTeacher:
    """Put ``teacher`` into the object store; Ray must be initialized."""
    return SharedTeacher(teacher.fingerprint, (ray.put(teacher),), cpu_offload)
