"""How a system's sentences ended: by themselves, at the length limit, at once, or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

ALMOST_NO_SPEECH_SECONDS = 0.2
"""Shorter than any word."""


@dataclass(frozen=True)
class EndOfSpeech:
    """Shares of all sentences of a system."""

    COLUMNS: ClassVar[tuple[str, ...]] = ("not_stopped", "stopped_at_once", "failed")
    """What a table keeps of it."""

    not_stopped: float
    """Ran into the length limit."""
    stopped_at_once: float
    """Ended by the model as soon as it was allowed to, or after almost no sound."""
    failed: float
    """Neither: nothing to hear for another reason."""
    reason: str = ""
    """Of the first one that failed."""

    def columns(self) -> dict[str, float]:
        """As columns of a table."""
        return {name: getattr(self, name) for name in self.COLUMNS}


def end_of_speech(rows: Sequence[Mapping[str, Any]]) -> EndOfSpeech:
    """Shares over the rows of an evaluation.

    Args:
        rows: ``speech_tokens``, ``stopped``, ``audio_seconds``, ``failure`` and ``fewest_tokens`` (speech tokens below
            which the stop was barred).
    """
    counts = dict.fromkeys(EndOfSpeech.COLUMNS, 0)
    for row in rows:
        if kind := _end_of_row(row):
            counts[kind] += 1
    reason = next((row["failure"] for row in rows if _end_of_row(row) == "failed"), "")
    return EndOfSpeech(**{kind: count / max(1, len(rows)) for kind, count in counts.items()}, reason=reason)


def _end_of_row(row: Mapping[str, Any]) -> str | None:
    num_tokens = len(row["speech_tokens"])
    if not row["stopped"]:
        # Without a token the model was never asked: the text was too long, or its logits were not finite.
        return "not_stopped" if num_tokens else "failed"
    barred = row.get("fewest_tokens") or 0
    if num_tokens <= barred or (not row["failure"] and row["audio_seconds"] < ALMOST_NO_SPEECH_SECONDS):
        return "stopped_at_once"
    return "failed" if row["failure"] and not row["audio_seconds"] else None
