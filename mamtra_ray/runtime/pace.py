"""How long the rest of a count takes, by its latest steps."""

from __future__ import annotations

from collections import deque

_WINDOW_SECONDS = 60.0
_FEWEST_STEPS = 8
"""Of slow steps, such as trials, at least so many are looked at, however long ago they were."""
_LONGEST_PAUSE = 30.0


class Pace:
    """The speed of a count over its latest steps.

    The average since the start would be wrong for hours after a slow beginning, or after a restart that found half of
    the work done. So the first note is only where the count stands, and pauses in which something else is done are
    left out.
    """

    def __init__(self) -> None:
        self._notes: deque[tuple[float, float]] = deque()  # (seconds, count)

    def note(self, done: float, now: float, *, is_work: bool = True) -> None:
        """The count is at ``done`` at the time ``now``, in seconds of any clock.

        Args:
            done: one that fell goes on from an older state; the speed until then holds.
            now: of this note.
            is_work: whether the time since the last note was spent on the count, and the count's growth its result.
        """
        if not self._notes:
            self._notes.append((now, done))
            return
        last, count = self._notes[-1]
        if done < count or not is_work:
            self._notes = deque((seconds + now - last, before + done - count) for seconds, before in self._notes)
        elif done > count:
            self._notes.append((now, done))
        while len(self._notes) > _FEWEST_STEPS + 1 and self._notes[1][0] <= now - _WINDOW_SECONDS:
            self._notes.popleft()

    @property
    def per_second(self) -> float | None:
        """Of the latest steps; None before two notes."""
        (first, before), (last, count) = self._notes[0] if self._notes else (0.0, 0.0), self._last
        return (count - before) / (last - first) if last > first else None

    def seconds_left(self, total: float, now: float) -> float | None:
        """Until ``total``, at the speed of the latest steps; the time since the last one counts as part of the next."""
        if self.per_second is None:
            return None
        last, count = self._last
        left = max(total - count, 0) / self.per_second
        return left - min(now - last, self._seconds_per_step, left)

    def seconds_without_news(self, now: float) -> float:
        """Since the last step, where that is unusually long ago; else 0."""
        silent = now - self._last[0] if self._notes else 0.0
        return silent if silent > max(_LONGEST_PAUSE, 3 * self._seconds_per_step) else 0.0

    @property
    def _last(self) -> tuple[float, float]:
        return self._notes[-1] if self._notes else (0.0, 0.0)

    @property
    def _seconds_per_step(self) -> float:
        return (self._last[0] - self._notes[0][0]) / max(len(self._notes) - 1, 1) if self._notes else 0.0
