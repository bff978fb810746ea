"""What a training step tells, read without making a GPU wait, and the curve of a training.

Reading a number of a GPU at once waits for all that was queued there. So numbers are copied to the host behind the step
that made them, and are read when they have long arrived: by the next step at the earliest, most of them at a report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mamtra_ray.distill.accumulation import TERMS

CURVE_POINTS = 100


class HostCopy:
    """Numbers on their way from a device; :meth:`read` waits for nothing that was queued after this was made."""

    def __init__(self, values_T: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._values_T = values_T
        if values_T.is_cuda:
            self._values_T = torch.empty(values_T.shape, dtype=values_T.dtype, pin_memory=True)
            self._values_T.copy_(values_T, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[float]:
        """As plain numbers."""
        if self._event is not None:
            self._event.synchronize()
        return self._values_T.tolist()


@dataclass(frozen=True)
class StepTerms:
    """The loss terms of a step, nats per token, and the norm of its gradient before clipping."""

    step: int
    """How many steps there have been, with this one."""
    tokens: int
    """Training tokens seen, with this step's."""
    learning_rate: float
    numbers: HostCopy
    """The :data:`TERMS` of this process's part of the batch, then ``grad_norm``."""

    def read(self) -> dict[str, float]:
        """A point of the curve."""
        *terms, norm = self.numbers.read()
        known = {"step": self.step, "tokens": self.tokens}
        return known | dict(zip(TERMS, terms, strict=True)) | {"learning_rate": self.learning_rate, "grad_norm": norm}


def read_curve(steps: Sequence[StepTerms]) -> list[dict[str, float]]:
    """About :data:`CURVE_POINTS` of the steps."""
    return [step.read() for step in steps[:: max(1, len(steps) // CURVE_POINTS)]]
