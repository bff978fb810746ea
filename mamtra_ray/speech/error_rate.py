"""An error rate with its interval: the one class for it, from the recognizer to the report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ErrorRate:
    """A word or character error rate, or the difference of two (fractions), with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """``0.8 % [0.0, 1.8]``."""
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"
