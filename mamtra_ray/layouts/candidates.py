"""Layouts that a search tries first, and where each comes from: the paper's placements that meet its constraints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from mamtra_ray.errors import InputError
from mamtra_ray.layouts.layout import Layout, num_attention_layers
from mamtra_ray.layouts.placements import from_strategy

_IMPORTANCE = "importance_"


@dataclass(frozen=True)
class Candidate:
    """A layout that will be tried, and where it comes from."""

    layout: Layout
    origin: str
    """``own`` (the user), ``block_beginning``, ``back``, ... (the paper), ``probe`` (the surrogate's optimum) or
    ``optuna``."""


@dataclass(frozen=True)
class SearchSpace:
    """The layouts that a search may use: so many layers, one of the ratios, some layers fixed."""

    num_layers: int
    ratios: tuple[str, ...]
    keep_attention: frozenset[int] = frozenset()
    always_mamba: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        """Refuse ratios and constraints that no layout can meet."""
        for layer in (*self.keep_attention, *self.always_mamba):
            if not 0 <= layer < self.num_layers:
                raise InputError(
                    f"search constraints: layer {layer} does not exist, layers go from 0 to {self.num_layers - 1}"
                )
        most, least = self.num_layers - len(self.always_mamba), len(self.keep_attention)
        for ratio in self.ratios:
            kept = self.num_attention(ratio)
            if not least <= kept <= most:
                raise InputError(
                    f"search.ratios: {ratio} keeps {kept} attention layers, but the constraints allow {least} to {most}"
                )

    def num_attention(self, ratio: str) -> int:
        """Attention layers of a layout of ``ratio``."""
        return num_attention_layers(self.num_layers, ratio)

    def num_layouts_of(self, num_attention: int) -> int:
        """How many layouts of so many attention layers meet the constraints."""
        free = self.num_layers - len(self.keep_attention) - len(self.always_mamba)
        return math.comb(free, num_attention - len(self.keep_attention))

    @property
    def num_layouts(self) -> int:
        """How many layouts there are to try."""
        return sum(self.num_layouts_of(kept) for kept in {self.num_attention(ratio) for ratio in self.ratios})

    def meets_constraints(self, layout: Layout) -> bool:
        """Whether ``layout`` respects ``keep_attention`` and ``always_mamba``."""
        return self.keep_attention <= set(layout.attention_layers) and self.always_mamba <= set(layout.mamba_layers)

    def allows(self, layout: Layout) -> bool:
        """Whether ``layout`` meets the constraints and has one of the ratios."""
        counts = {self.num_attention(ratio) for ratio in self.ratios}
        return layout.num_attention in counts and self.meets_constraints(layout)


OWN = "own"
"""Origin of a layout that the user gave."""


def own_candidates(space: SearchSpace, layouts: Sequence[str]) -> list[Candidate]:
    """The user's own layouts (``search.layouts``), in their order.

    Raises:
        InputError: one of another number of layers, of a ratio that is not searched, or against a constraint.
    """
    candidates = [Candidate(Layout.from_string(letters), OWN) for letters in layouts]
    for layout in (candidate.layout for candidate in candidates):
        if layout.num_layers != space.num_layers:
            raise InputError(
                f"search.layouts: {layout} has {layout.num_layers} layers, the teacher has {space.num_layers}"
            )
        if layout.num_attention not in {space.num_attention(ratio) for ratio in space.ratios}:
            raise InputError(
                f"search.layouts: {layout} has the ratio {layout.ratio}, which search.ratios does not have "
                f"({', '.join(space.ratios)})"
            )
        if not space.meets_constraints(layout):
            raise InputError(f"search.layouts: {layout} breaks search.keep_attention or search.always_mamba")
    return candidates


def importance_criteria(strategies: Sequence[str]) -> list[str]:
    """The criteria by which strategies ask for layer importance: ``wer`` of ``importance_wer``."""
    return [name.removeprefix(_IMPORTANCE) for name in strategies if name.startswith(_IMPORTANCE)]


def given_candidates(
    space: SearchSpace,
    strategies: Sequence[str],
    layouts: Sequence[str] = (),
    importance: Mapping[str, Sequence[float]] = MappingProxyType({}),
) -> list[Candidate]:
    """What a search tries and distills in any case: the user's own layouts, then the paper's placements.

    Arguments and errors as of :func:`own_candidates` and :func:`paper_candidates`.
    """
    return without_repeats([*own_candidates(space, layouts), *paper_candidates(space, strategies, importance)])


def paper_candidates(
    space: SearchSpace,
    strategies: Sequence[str],
    importance: Mapping[str, Sequence[float]] = MappingProxyType({}),
) -> list[Candidate]:
    """The paper's placements at every ratio; one that breaks a constraint of the search is left out.

    Args:
        space: the layouts to choose from.
        strategies: of :data:`~mamtra_ray.layouts.PATTERNS`, or ``importance_<criterion>``.
        importance: one score per layer for each criterion. A strategy ``importance_<criterion>`` whose scores are not
            measured yet is left out too.
    """
    candidates = []
    for ratio in space.ratios:
        for strategy in strategies:
            criterion = strategy.removeprefix(_IMPORTANCE)
            if criterion == strategy:
                candidates.append(Candidate(from_strategy(strategy, space.num_layers, ratio), strategy))
            elif criterion in importance:
                layout = from_strategy("importance", space.num_layers, ratio, importance[criterion])
                candidates.append(Candidate(layout, strategy))
    return without_repeats(candidate for candidate in candidates if space.meets_constraints(candidate.layout))


def without_repeats(candidates: Iterable[Candidate]) -> list[Candidate]:
    """``candidates`` in order, each layout once (with its first origin)."""
    first: dict[Layout, Candidate] = {}
    for candidate in candidates:
        first.setdefault(candidate.layout, candidate)
    return list(first.values())
