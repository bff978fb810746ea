"""Layouts as Optuna parameters: every point meets its ratio, every layout has a point."""

import itertools

import optuna
import pytest

from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.candidates import (
    Candidate,
    SearchSpace,
    given_candidates,
    own_candidates,
    paper_candidates,
    without_repeats,
)
from mamtra_ray.search.parameter_space import layout_from_params, param_space, params_from_layout, sampler


@pytest.mark.parametrize(
    "space",
    [
        SearchSpace(6, ("1:1",)),
        SearchSpace(6, ("1:1", "1:2")),
        SearchSpace(6, ("1:1",), frozenset({0}), frozenset({4})),
    ],
)
def test_every_layout_of_the_ratios_survives_the_round_trip(space):
    allowed = [
        layout
        for letters in itertools.product("AM", repeat=6)
        if space.meets_constraints(layout := Layout("".join(letters))) and layout.ratio in space.ratios
    ]
    assert len(allowed) > 5
    for layout in allowed:
        assert space.allows(layout)
        assert layout_from_params(params_from_layout(layout, space), space) == layout
    assert not space.allows(Layout("AAAAAM"))


@pytest.mark.parametrize("kind", ["tpe", "nsga2", "random"])
def test_sampled_points_meet_ratio_and_constraints(kind):
    space = SearchSpace(8, ("1:1", "1:3"), frozenset({2}), frozenset({0, 7}))
    study = optuna.create_study(sampler=sampler(kind, 0))
    seen = set()
    for _ in range(30):
        trial = study.ask(param_space(space))
        layout = layout_from_params(trial.params, space)
        assert layout.ratio in space.ratios and space.meets_constraints(layout)
        seen.add(layout)
        study.tell(trial, len(seen))
    assert len(seen) > 5


def test_papers_layouts_come_first_once_and_only_if_allowed():
    found = paper_candidates(SearchSpace(4, ("1:1",)), ("block_beginning", "back", "front"))
    assert [(c.origin, str(c.layout)) for c in found] == [
        ("block_beginning", "AMAM"),
        ("back", "MMAA"),
        ("front", "AAMM"),
    ]
    kept = paper_candidates(SearchSpace(4, ("1:1",), frozenset({0})), ("block_beginning", "back"))
    assert [c.origin for c in kept] == ["block_beginning"]
    space, by_rank = SearchSpace(4, ("1:1",)), ("importance_wer", "importance_cosine")
    assert paper_candidates(space, by_rank) == []
    both = {"wer": [0.0, 3.0, 1.0, 2.0], "cosine": [3.0, 2.0, 1.0, 0.0]}
    assert paper_candidates(space, by_rank, both) == [
        Candidate(Layout("MAMA"), "importance_wer"),
        Candidate(Layout("AAMM"), "importance_cosine"),
    ]
    twice = [Candidate(Layout("AM"), "front"), Candidate(Layout("AM"), "probe"), Candidate(Layout("MA"), "probe")]
    assert without_repeats(twice) == [twice[0], twice[2]]


def test_own_layouts_come_first_and_must_fit_the_search():
    space = SearchSpace(4, ("1:1", "1:3"), frozenset({0}))
    found = given_candidates(space, ("block_beginning",), ("AMMA", "AMAM", "AMMM"))
    assert [(str(c.layout), c.origin) for c in found] == [("AMMA", "own"), ("AMAM", "own"), ("AMMM", "own")]
    assert given_candidates(space, ("block_beginning",)) == paper_candidates(space, ("block_beginning",))
    for layout, problem in {
        "AMAMA": "has 5 layers, the teacher has 4",
        "AAAM": r"has the ratio 3:1, which search.ratios does not have \(1:1, 1:3\)",
        "MAMA": r"breaks search\.keep_attention",
    }.items():
        with pytest.raises(InputError, match=f"search.layouts: {layout} {problem}"):
            own_candidates(space, (layout,))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"ratios": ("1:4",)}, "does not fit 12 layers"),
        ({"ratios": ("1:1",), "keep_attention": frozenset({12})}, "layer 12 does not exist"),
        (
            {"ratios": ("1:11",), "keep_attention": frozenset({0, 1})},
            "keeps 1 attention layers, but the constraints allow",
        ),
        ({"ratios": ("1:1",), "always_mamba": frozenset(range(7))}, "constraints allow 0 to 5"),
    ],
)
def test_impossible_ratios_are_one_sentence(arguments, sentence):
    with pytest.raises(InputError) as caught:
        SearchSpace(12, **arguments)
    assert sentence in str(caught.value)
