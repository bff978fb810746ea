"""Section ``search``: which layouts are tried, how long, and which of them go on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from mamtra_ray.config.types import Count, CountOrZero, Layers, LearningRate, Section, Several
from mamtra_ray.errors import InputError, nearest_name
from mamtra_ray.layouts import PATTERNS, Layout, parse_ratio

IMPORTANCE_CRITERIA = ("wer", "cosine", "kl")
SEARCH_STRATEGIES = (*PATTERNS, *(f"importance_{criterion}" for criterion in IMPORTANCE_CRITERIA))
"""What ``search.strategies`` may name."""


def _lowest_terms(ratio: str) -> str:
    """Refuses what is no ratio; ``2:2`` is said to be ``1:1``, so that no ratio stands twice under two names."""
    try:
        attention, mamba = parse_ratio(ratio)
    except InputError as error:
        raise ValueError(str(error)) from None
    for divisor in range(min(attention, mamba), 1, -1):
        if attention % divisor == 0 and mamba % divisor == 0:
            raise ValueError(f"{ratio} is not in lowest terms: write {attention // divisor}:{mamba // divisor}")
    return ratio


def _known_strategy(strategy: str) -> str:
    if strategy not in SEARCH_STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}: {nearest_name(strategy, SEARCH_STRATEGIES)}")
    return strategy


def _letters(layout: str) -> str:
    try:
        return str(Layout.from_string(layout))
    except InputError as error:
        raise ValueError(str(error)) from None


OwnLayout = Annotated[str, AfterValidator(_letters)]
Ratio = Annotated[str, AfterValidator(_lowest_terms)]
Strategy = Annotated[str, AfterValidator(_known_strategy)]


class SearchConfig(Section):
    ratios: Annotated[tuple[Ratio, ...], Several] = Field(("1:1",), min_length=1)
    """Attention to Mamba, such as 1:3, in lowest terms: a layout of each is found, compared and exported."""
    strategies: Annotated[tuple[Strategy, ...], Several] = ("block_beginning",)
    """The paper's placements that are always among the candidates, at every ratio: block_beginning, block_end, front,
    middle, back, sandwich; and importance_wer, importance_cosine, importance_kl, which keep the layers that lose most
    words when replaced, turn their input most, or have the highest KL divergence when replaced."""
    layouts: Annotated[tuple[OwnLayout, ...], Several] = ()
    """Layouts of your own, one letter per layer such as AMAM, that are candidates and finalists like the placements of
    `search.strategies`; each of one of the `search.ratios`."""
    trials: Count = 32
    """Layouts that Tune starts in all, the paper's placements among them."""
    sampler: Literal["surrogate", "tpe", "nsga2", "gp", "random", "grid"] = "surrogate"
    """What proposes layouts to Optuna: the probe's scores corrected by the trials' own (surrogate), a sampler of
    Optuna's for comparison, or nothing (grid): exactly the strategies at the ratios, and the layouts."""
    rung_tokens: Annotated[tuple[Count, ...], Several] = Field((1_000_000, 4_000_000), min_length=1)
    """Training tokens at which successive halving compares trials, ascending; the last one ends a trial."""
    learning_rate: LearningRate | Literal["auto"] | None = None
    """Peak learning rate of trials, where their short schedules want a lower one than finalists do; none: that of
    `distill.learning_rate`; auto: measured, as there."""
    tokens_per_batch: Count | None = None
    """Padded tokens of a trial's batch, over all its workers: smaller ones make more steps of a short rung; none: as
    `distill.tokens_per_batch`."""
    reduction_factor: Annotated[int, Field(ge=2, le=1000)] = 4
    """One of this many trials passes a rung."""
    keep_attention: Layers = ()
    """Layers (0-based) that must keep attention."""
    always_mamba: Layers = ()
    """Layers (0-based) that must be replaced."""
    sentences: CountOrZero = 0
    """Validation sentences that a trial speaks at the last rung; finalists are then chosen by WER and CE. 0: by CE, as
    with `evaluate.sentences=0`, which switches off all speech."""
    objectives: Annotated[tuple[Literal["ce", "wer"], ...], Several] = ("ce",)
    """What proposals are made to lower: ce, or ce and the wer of `search.sentences`. A trial that is stopped before
    it speaks has no WER and stands for none; the sampler surrogate listens once 8 trials have spoken. With several
    ratios Optuna's samplers lower the cost as well."""
    finalists: CountOrZero = 1
    """Found layouts of each ratio that are distilled longer and heard, beside the paper's placements."""
    cost: Literal["cache_bytes", "decode_flops", "parameters"] = "cache_bytes"
    """What a layout costs: an objective beside CE where there are several ratios."""
    workers_per_trial: Count = 1
    """1: a trial is one actor; more: every trial is a Ray Train run of that many workers."""
    loggers: Annotated[tuple[Literal["mlflow", "wandb"], ...], Several] = ()
    """Where trials are told beside the run's own files: MLflow, Weights & Biases. Their packages are installed by the
    user, and read their own environment variables."""

    @model_validator(mode="after")
    def _consistent(self) -> SearchConfig:
        if list(self.rung_tokens) != sorted(set(self.rung_tokens)):
            raise ValueError(f"rung_tokens must ascend, such as [20000, 40000], not {list(self.rung_tokens)}")
        for name in ("ratios", "strategies", "layouts", "objectives", "loggers"):
            values = getattr(self, name)
            if repeated := next((value for value in values if values.count(value) > 1), None):
                raise ValueError(f"{name} has {repeated} twice")
        if both := sorted(set(self.keep_attention) & set(self.always_mamba)):
            raise ValueError(f"layer {both[0]} stands in both search.keep_attention and search.always_mamba")
        if self.sentences and self.workers_per_trial > 1:
            raise ValueError("sentences above 0 needs workers_per_trial=1: a trial speaks where it trains")
        if "ce" not in self.objectives:
            raise ValueError(f"objectives must have ce, such as [ce, wer], not {list(self.objectives)}")
        if "wer" in self.objectives and not self.sentences:
            raise ValueError("objectives has wer, but trials do not speak: set sentences, such as 20")
        if self.sampler == "grid" and not (self.strategies or self.layouts):
            raise ValueError("sampler grid tries search.strategies and search.layouts, and there are none")
        if not (self.strategies or self.layouts) and not self.finalists:
            raise ValueError("with no strategies, no layouts and finalists=0 nothing would be distilled")
        return self
