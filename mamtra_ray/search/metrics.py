"""A run's figures on Ray's metrics endpoint, for Prometheus and the Grafana dashboard in ``cluster/``."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge


class SearchMetrics:
    """Trials finished, best scores, speed and cost; every series is tagged with the run's name."""

    def __init__(self, run: str) -> None:
        tags = {"tag_keys": ("run",)}
        self.trials_finished = Counter("mamtra_trials_finished", "Trials that ended", **tags)
        self.best_ce = Gauge("mamtra_best_ce", "Lowest held-out cross-entropy, nats per token", **tags)
        self.best_wer = Gauge("mamtra_best_wer", "Lowest word error rate of generated speech, 0 to 1", **tags)
        self.tokens_per_second = Gauge("mamtra_tokens_per_second", "Training speed of the last trial", **tags)
        self.cache_bytes = Gauge("mamtra_cache_bytes", "Decoding cache of the best layout, bytes", **tags)
        for metric in vars(self).values():
            metric.set_default_tags({"run": run})
