"""Before a search: the teacher and a hybrid of it generate what they compute."""

from __future__ import annotations

from mamtra_ray.layouts import from_strategy
from mamtra_ray.models.mamba import StateSharing
from mamtra_ray.runtime.device import device_of_this_process
from mamtra_ray.speech_lm.generation_check import (
    Difference,
    GenerationCheckError,
    NonFiniteLogitsError,
    check_generation,
    disturb,
)
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.teachers.shared import SharedTeacher
from mamtra_ray.teachers.teacher import Teacher


def check_teacher_and_hybrid(teacher: Teacher, ratio: str, state_sharing: StateSharing) -> Difference:
    """Before a search: :func:`check_generation` of a hybrid of ``ratio`` with transferred mixers.

    It has attention layers as the teacher has, so the teacher alone is checked only where the hybrid fails, to say
    which of the two it is. The hybrid shares the teacher's tensors, so it costs almost no memory. Its mixers are
    disturbed as if they had been trained: new ones pass their input through a convolution that does nothing, in which
    no error would show.
    """
    layout = from_strategy("block_beginning", teacher.model.layout.num_layers, ratio)
    hybrid = make_student(teacher.model, layout, state_sharing=state_sharing, share_weights=True)
    new_mixers = [tensor for name, tensor in hybrid.named_parameters() if name not in teacher.model.state_dict()]
    disturb(new_mixers)
    try:
        return check_generation(hybrid, teacher.sequence, f"an untrained hybrid of {teacher.name}")
    except (GenerationCheckError, NonFiniteLogitsError):
        check_generation(teacher.model, teacher.sequence, f"teacher {teacher.name}")
        raise


def check_shared_teacher(teacher: SharedTeacher, ratio: str, state_sharing: StateSharing) -> Difference:
    """:func:`check_teacher_and_hybrid` in a Ray worker, on its GPU if it has one."""
    loaded = teacher.load()
    loaded.model.to(device_of_this_process().type)
    return check_teacher_and_hybrid(loaded, ratio, state_sharing)
