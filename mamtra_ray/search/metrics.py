"""A run's figures on Ray's metrics endpoint, for Prometheus and the Grafana dashboard in ``cluster/``."""

from __future__ import annotations

from typing import Any

from ray.util.metrics import Counter, Gauge

SECONDS_BETWEEN_EXPORTS = 5.0


class _LastingGauge(Gauge):
    """Ray exports a gauge's value once and then forgets it; a graph needs it as long as it holds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.last: float | None = None

    def set(self, value: int | float | None, tags: Any = None) -> None:
        super().set(value, tags)
        self.last = value

    def set_again(self) -> None:
        if self.last is not None:
            super().set(self.last)


class SearchMetrics:
    """Trials finished, best scores, speed and cost; every series is tagged with the run's folder.

    Its name alone would not do: two searches on one cluster may both be called ``demo``.
    """

    def __init__(self, run: str) -> None:
        tags = {"tag_keys": ("run",)}
        self.trials_finished = Counter("mamtra_trials_finished", "Trials that ended", **tags)
        self.best_ce = _LastingGauge("mamtra_best_ce", "Lowest held-out cross-entropy, nats per token", **tags)
        self.best_wer = _LastingGauge("mamtra_best_wer", "Lowest word error rate of generated speech, 0 to 1", **tags)
        self.tokens_per_second = _LastingGauge("mamtra_tokens_per_second", "Training speed of the last trial", **tags)
        self.cache_bytes = _LastingGauge("mamtra_cache_bytes", "Decoding cache of the best layout, bytes", **tags)
        for metric in vars(self).values():
            metric.set_default_tags({"run": run})

    def set_again(self) -> None:
        """To be called every :data:`SECONDS_BETWEEN_EXPORTS`."""
        for metric in vars(self).values():
            if isinstance(metric, _LastingGauge):
                metric.set_again()
