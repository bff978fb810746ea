"""What Ray Tune tries next: the starting points, then Optuna's proposals; every layout once, in all sessions of a run.

Optuna's samplers propose what they have proposed before: TPE because it was good, all of them because a session begins
with the same seed. A proposal that was tried already is told to Optuna as failed and asked for again; a sampler that
insists is overruled by an untried layout of the same ratio, drawn uniformly.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher

from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.candidates import Candidate, SearchSpace
from mamtra_ray.search.parameter_space import layout_from_params, param_space, params_from_layout
from mamtra_ray.search.surrogate_sampler import FIRST_RUNG_KL, LAYOUT, WER

_ASKS = 8
"""Repeats of a sampler before a layout is drawn instead."""
_TOLD = (
    FIRST_RUNG_KL,
    "rung",
    "tokens",
    "ce",
    "kl",
    "ce_start",
    "kl_start",
    WER,
    "wer_low",
    "wer_high",
    "token_error_rate",
    "seconds",
)
"""What of a trial's results becomes a user attribute of the study, where optuna-dashboard shows it."""


class LayoutProposals(Searcher):
    """Tune's searcher over the layouts of a space; a trial's parameters are ``{"layout": "AMAM"}``.

    Args:
        space: the layouts to choose from.
        candidates: tried first, in this order. Those that an earlier session scored are among them, which gives Optuna
            its history back.
        study: gets the values of every trial.
        metrics: their names in a trial's result.
        seed: of the uniform draws: a resumed search draws the same layouts as one that was not stopped.
        asks_study: whether the study's sampler proposes; if not, all are drawn uniformly.
    """

    def __init__(
        self,
        space: SearchSpace,
        candidates: Sequence[Candidate],
        study: optuna.Study,
        metrics: Sequence[str],
        seed: int,
        *,
        asks_study: bool,
    ) -> None:
        super().__init__()
        self.space, self.study, self.metrics = space, study, list(metrics)
        self.asks_study = asks_study
        self._waiting = deque(candidates)
        self._origins = {candidate.layout: candidate.origin for candidate in candidates}
        self._tried = {candidate.layout for candidate in candidates}
        self._draws = UniformLayouts(space, seed)
        self._trials: dict[str, optuna.Trial] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **_: Any) -> bool:
        """The space is known already."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """The next layout; ``FINISHED`` when every layout of the space has been tried."""
        if self._waiting:
            trial, layout = self._enqueued(self._waiting.popleft().layout)
        elif len(self._tried) >= self.space.num_layouts:
            return Searcher.FINISHED
        else:
            trial, layout = self._untried()
            self._tried.add(layout)
        trial.set_user_attr(LAYOUT, str(layout))
        trial.set_user_attr("ratio", layout.ratio)
        trial.set_user_attr("origin", self._origins.get(layout, "optuna"))
        self._trials[trial_id] = trial
        return {"layout": str(layout)}

    def _untried(self) -> tuple[optuna.Trial, Layout]:
        ratio = None
        for _ in range(_ASKS if self.asks_study else 0):
            trial = self.study.ask(param_space(self.space))
            layout = layout_from_params(trial.params, self.space)
            if layout not in self._tried:
                return trial, layout
            trial.set_user_attr("repeats", str(layout))
            self.study.tell(trial, state=TrialState.FAIL)
            ratio = layout.num_attention
        return self._enqueued(self._draws.next_untried(self._tried, ratio))

    def _enqueued(self, layout: Layout) -> tuple[optuna.Trial, Layout]:
        self.study.enqueue_trial(params_from_layout(layout, self.space))
        return self.study.ask(param_space(self.space)), layout

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Only the end of a trial is told to the sampler; its scores so far are shown."""
        # What the sampler reads from here it is to see with the trial's end alone.
        shown = {name: value for name, value in result.items() if name not in (FIRST_RUNG_KL, WER)}
        self._show(self._trials[trial_id], shown)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna; a trial that lacks an objective, such as the WER of one that never spoke, is told as failed:
        nothing stands for what was not measured."""
        trial = self._trials.pop(trial_id)
        found = {name: value for name, value in (result or {}).items() if value is not None}
        self._show(trial, found)
        if all(name in found for name in self.metrics):
            self.study.tell(trial, [found[name] for name in self.metrics])
        else:
            self.study.tell(trial, state=TrialState.FAIL)

    @staticmethod
    def _show(trial: optuna.Trial, result: dict[str, Any]) -> None:
        for name in _TOLD:
            if result.get(name) is not None and trial.user_attrs.get(name) != result[name]:
                trial.set_user_attr(name, result[name])

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the trials table has all that a later session needs."""

    def restore(self, checkpoint_path: str) -> None:
        """As :meth:`save`."""


class UniformLayouts:
    """A seeded sequence of layouts: of every ratio as often, and of a ratio each layout as likely."""

    def __init__(self, space: SearchSpace, seed: int) -> None:
        self.space, self._random = space, np.random.default_rng(seed)

    def next_untried(self, tried: set[Layout], num_attention: int | None = None) -> Layout:
        """The next one that is not in ``tried``, of one ratio if that has any left. There must be one."""
        if num_attention is not None:
            of_ratio = sum(layout.num_attention == num_attention for layout in tried)
            if of_ratio >= self.space.num_layouts_of(num_attention):
                num_attention = None
        while True:
            layout = self._draw()
            if layout not in tried and num_attention in (None, layout.num_attention):
                return layout

    def _draw(self) -> Layout:
        space = self.space
        kept = space.num_attention(space.ratios[self._random.integers(len(space.ratios))])
        free = sorted(set(range(space.num_layers)) - space.keep_attention - space.always_mamba)
        chosen = self._random.choice(free, kept - len(space.keep_attention), replace=False)
        return Layout.from_attention_layers([*space.keep_attention, *map(int, chosen)], space.num_layers)
