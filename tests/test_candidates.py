"""Layouts as Optuna parameters: every point meets the budget, every layout has a point."""

import itertools

import optuna
import pytest
from mamtra_ray.search.candidates import check_budgets, meets_constraints

from mamtra_ray.config import SearchConfig
from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.candidates import Candidate, paper_candidates, without_repeats
from mamtra_ray.search.parameter_space import layout_from_params, param_space, params_from_layout, sampler


@pytest.mark.parametrize(
    "search",
    [
        SearchConfig(ratios=("1:1",)),
        SearchConfig(ratios=("1:1", "1:2")),
        SearchConfig(ratios=("1:1",), keep_attention=(0,), always_mamba=(4,)),
    ],
)
def test_every_layout_of_the_budgets_survives_the_round_trip(search):
    allowed = [
        layout
        for letters in itertools.product("AM", repeat=6)
        if meets_constraints(layout := Layout("".join(letters)), search) and layout.ratio in search.ratios
    ]
    assert len(allowed) > 5
    for layout in allowed:
        assert layout_from_params(params_from_layout(layout, search), search, 6) == layout


@pytest.mark.parametrize("kind", ["tpe", "nsga2", "random"])
def test_sampled_points_meet_budget_and_constraints(kind):
    search = SearchConfig(ratios=("1:1", "1:3"), sampler=kind, keep_attention=(2,), always_mamba=(0, 7))
    study = optuna.create_study(sampler=sampler(search))
    seen = set()
    for _ in range(30):
        trial = study.ask(param_space(search, 8))
        layout = layout_from_params(trial.params, search, 8)
        assert layout.ratio in search.ratios and meets_constraints(layout, search)
        seen.add(layout)
        study.tell(trial, len(seen))
    assert len(seen) > 5


def test_papers_layouts_come_first_once_and_only_if_allowed():
    found = paper_candidates(SearchConfig(ratios=("1:1",), strategies=("block_beginning", "back", "front")), 4)
    assert [(c.origin, str(c.layout)) for c in found] == [
        ("block_beginning", "AMAM"),
        ("back", "MMAA"),
        ("front", "AAMM"),
    ]
    kept = paper_candidates(SearchConfig(ratios=("1:1",), keep_attention=(0,)), 4)
    assert [c.origin for c in kept] == ["block_beginning"]
    by_rank = SearchConfig(ratios=("1:1",), strategies=("importance_wer", "importance_cosine"))
    assert paper_candidates(by_rank, 4) == []
    both = {"wer": [0.0, 3.0, 1.0, 2.0], "cosine": [3.0, 2.0, 1.0, 0.0]}
    assert paper_candidates(by_rank, 4, both) == [
        Candidate(Layout("MAMA"), "importance_wer"),
        Candidate(Layout("AAMM"), "importance_cosine"),
    ]
    twice = [Candidate(Layout("AM"), "front"), Candidate(Layout("AM"), "probe"), Candidate(Layout("MA"), "probe")]
    assert without_repeats(twice) == [twice[0], twice[2]]


@pytest.mark.parametrize(
    ("search", "sentence"),
    [
        (SearchConfig(ratios=("1:4",)), "does not fit 12 layers"),
        (SearchConfig(keep_attention=(12,)), "layer 12 does not exist"),
        (SearchConfig(ratios=("1:11",), keep_attention=(0, 1)), "keeps 1 attention layers, but the constraints allow"),
        (SearchConfig(ratios=("1:1",), always_mamba=tuple(range(7))), "constraints allow 0 to 5"),
    ],
)
def test_impossible_budgets_are_one_sentence(search, sentence):
    with pytest.raises(InputError) as caught:
        check_budgets(search, 12)
    assert sentence in str(caught.value)
