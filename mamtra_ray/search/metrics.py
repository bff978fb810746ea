"""A run's figures on Ray's metrics endpoint, for Prometheus and the Grafana dashboard in ``cluster/``.

Ray puts ``ray_`` before every name, and ``_total`` after those of counters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray.util.metrics import Counter, Gauge

from mamtra_ray.run.rows import FinalistRow

SECONDS_BETWEEN_EXPORTS = 5.0


class _LastingGauge(Gauge):
    """Ray exports a gauge's value once and then forgets it; a graph needs it as long as it holds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.last: dict[str, float] = {}

    def set_in(self, phase: str, value: float) -> None:
        """The value in a phase of the run."""
        self.last[phase] = value
        self.set(value, {"phase": phase})

    def set_again(self) -> None:
        for phase, value in list(self.last.items()):
            self.set(value, {"phase": phase})


class SearchMetrics:
    """Progress, trials, best scores, speed and cost; every series is tagged with the run's folder and the phase.

    The run's name alone would not do: two searches on one cluster may both be called ``demo``.
    """

    def __init__(self, run: str) -> None:
        tags = {"tag_keys": ("run", "phase")}
        self.phase_progress = _LastingGauge("mamtra_phase_progress", "Part of a phase that is done, 0 to 1", **tags)
        self.tokens_per_second = _LastingGauge("mamtra_tokens_per_second", "Speed; of trials: of the last one", **tags)
        self.trials_finished = Counter("mamtra_trials_finished", "Trials that ended", **tags)
        self.trials_failed = Counter("mamtra_trials_failed", "Trials of these that failed", **tags)
        self.best_ce = _LastingGauge("mamtra_best_ce", "Lowest held-out cross-entropy, nats per token", **tags)
        self.best_wer = _LastingGauge("mamtra_best_wer", "Lowest word error rate of generated speech, 0 to 1", **tags)
        self.trial_wer = _LastingGauge("mamtra_trial_wer", "Word error rate of the last trial that spoke", **tags)
        self.trial_wer_low = _LastingGauge("mamtra_trial_wer_low", "Lower end of its 95 % interval", **tags)
        self.trial_wer_high = _LastingGauge("mamtra_trial_wer_high", "Upper end of its 95 % interval", **tags)
        self.trial_token_error_rate = _LastingGauge(
            "mamtra_trial_token_error_rate", "Edits between its tokens and the teacher's, over the teacher's", **tags
        )
        self.cache_bytes = _LastingGauge("mamtra_cache_bytes", "Decoding cache of the best layout, bytes", **tags)
        for metric in vars(self).values():
            metric.set_default_tags({"run": run})

    def trial_scored(self, result: Mapping[str, Any]) -> None:
        """A trial has reported a rung; ``wer`` and its like are there where it spoke."""
        self.tokens_per_second.set_in("trials", result["tokens_per_second"])
        if result.get("wer") is None:
            return
        best = self.best_wer.last.get("trials", result["wer"])
        self.best_wer.set_in("trials", min(best, result["wer"]))
        for name, gauge in (
            ("wer", self.trial_wer),
            ("wer_low", self.trial_wer_low),
            ("wer_high", self.trial_wer_high),
            ("token_error_rate", self.trial_token_error_rate),
        ):
            gauge.set_in("trials", result[name])

    def best_trial(self, ce: float, cache_bytes: float) -> None:
        """The best trial so far."""
        self.best_ce.set_in("trials", ce)
        self.cache_bytes.set_in("trials", cache_bytes)

    def trial_ended(self, *, failed: bool) -> None:
        """With all of its scores, or without."""
        self.trials_finished.inc(tags={"phase": "trials"})
        if failed:
            self.trials_failed.inc(tags={"phase": "trials"})

    def finalists_distilled(self, finalists: Sequence[FinalistRow]) -> None:
        """The lowest CE of them, and what that one's cache takes."""
        best = min(finalists, key=lambda row: row.ce)
        self.best_ce.set_in("finalists", best.ce)
        self.cache_bytes.set_in("finalists", best.cache_bytes)

    def finalists_heard(self, finalists: Sequence[FinalistRow]) -> None:
        """The lowest WER of them."""
        self.best_wer.set_in("speech", min(row.wer.value for row in finalists if row.wer))

    def note_progress(self, phase: str, part: float | None, tokens_per_second: float | None) -> None:
        """What :meth:`mamtra_ray.runtime.progress.Screen.progress` says."""
        if phase and part is not None:
            self.phase_progress.set_in(phase, part)
        if phase and tokens_per_second is not None:
            self.tokens_per_second.set_in(phase, tokens_per_second)

    def set_again(self) -> None:
        """To be called every :data:`SECONDS_BETWEEN_EXPORTS`."""
        for metric in vars(self).values():
            if isinstance(metric, _LastingGauge):
                metric.set_again()
