"""Which layouts the rounds ask for, against sums and optima found by brute force."""

import itertools

import numpy as np
import pytest

from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.candidates import SearchSpace
from mamtra_ray.layouts.constraints import Constraints, layouts_to_matrix
from mamtra_ray.probe.rounds import lowest_sums, rounds, single_replacements
from mamtra_ray.surrogate.quadratic import Quadratic


def interacting_kl(num_layers, seed):
    """KL that grows with every layer, more beside a replaced neighbor."""
    rng = np.random.default_rng(seed)
    pairs = np.triu(np.tril(rng.normal(size=(num_layers, num_layers)) * 0.1, 2), 1)
    quadratic = Quadratic(-4.0, 0.3 + 0.2 * rng.normal(size=num_layers), pairs)
    return lambda layout: float(np.exp(quadratic(layouts_to_matrix([layout], num_layers))[0]))


def asked(space, kl, total, *, given=(), scores=None, stop_after=None):
    """Everything that was asked for, in order; every list is scored before the next one."""
    scores, order = {} if scores is None else scores, []
    for wanted in rounds(space, given, total, 0, scores):
        for layout in wanted:
            assert layout not in scores, "a known score was asked for"
            if stop_after is not None and len(order) == stop_after:
                return order
            scores[layout] = kl(layout)
            order.append(layout)
    return order


def every_layout(num_layers):
    return [Layout("".join(letters)) for letters in itertools.product("AM", repeat=num_layers)]


def test_single_replacements_and_the_lowest_sums_are_scored():
    space, kl = SearchSpace(12, ("1:1", "1:3")), interacting_kl(12, 0)
    order = asked(space, kl, 80, given=[Layout("AM" * 6)])
    singles = [Layout("A" * layer + "M" + "A" * (11 - layer)) for layer in range(12)]
    assert len(order) <= 80 and order[0] == Layout("AM" * 6) and set(singles) <= set(order[:40])
    cost = [kl(layout) for layout in singles]
    for kept in (6, 3):
        of_ratio = [layout for layout in every_layout(12) if layout.num_attention == kept]
        by_sum = sorted(of_ratio, key=lambda layout: sum(cost[layer] for layer in layout.mamba_layers))
        assert set(by_sum[:3]) <= set(order[:45])
        assert min(map(kl, of_ratio)) == min(kl(layout) for layout in order if layout.num_attention == kept)


def test_single_replacements_respect_the_constraints():
    space = SearchSpace(6, ("1:1",), keep_attention=frozenset({0}), always_mamba=frozenset({4}))
    singles = single_replacements(space)
    assert [str(layout) for layout in singles] == ["AMAAMA", "AAMAMA", "AAAMMA", "AAAAMM"]
    costs = dict(zip(singles, (0.4, 0.1, 0.3, 0.2), strict=True))
    constraints = Constraints.from_ratio(6, "1:1", (0,), (4,))
    assert [str(layout) for layout in lowest_sums(costs, constraints, 2)] == ["AAMAMM", "AAMMMA"]


def test_fixed_layers_stay_fixed():
    space = SearchSpace(12, ("1:1",), keep_attention=frozenset({0, 5}), always_mamba=frozenset({3, 4}))
    order = asked(space, interacting_kl(12, 1), 60)
    assert set(single_replacements(space)) <= set(order) and all(map(space.meets_constraints, order))


def test_few_scores_go_to_the_ratios_alone():
    space = SearchSpace(12, ("1:1",))
    order = asked(space, interacting_kl(12, 2), 16)
    assert len(order) == 16 and {layout.num_attention for layout in order} == {6}


@pytest.mark.parametrize("stop_after", [5, 30, 47, 70])
def test_going_on_after_a_stop_spends_no_more_and_ends_alike(stop_after):
    space, kl = SearchSpace(12, ("1:1", "1:3")), interacting_kl(12, 3)
    whole = asked(space, kl, 80)
    scores = {}
    first = asked(space, kl, 80, scores=scores, stop_after=stop_after)
    assert first == whole[:stop_after]
    assert len(first) + len(asked(space, kl, 80, scores=scores)) <= 80
    for kept in (6, 3):
        best = [min(kl(layout) for layout in found if layout.num_attention == kept) for found in (whole, scores)]
        assert best[0] == best[1]


def test_singles_are_left_out_where_every_layout_can_be_scored():
    order = asked(SearchSpace(6, ("1:1", "1:2")), interacting_kl(6, 5), 100)
    assert sorted(order) == sorted(layout for layout in every_layout(6) if layout.num_attention in (2, 3))


def test_scores_of_other_ratios_are_not_counted():
    space, kl = SearchSpace(12, ("1:3",)), interacting_kl(12, 4)
    others = {layout: kl(layout) for layout in every_layout(12) if layout.num_attention == 6}
    order = asked(space, kl, 60, scores=dict(others))
    of_ratio = [layout for layout in order if layout.num_attention == 3]
    assert len(of_ratio) >= 24
    assert min(map(kl, of_ratio)) == min(kl(layout) for layout in every_layout(12) if layout.num_attention == 3)


def test_a_ratio_that_nothing_meets_is_one_sentence():
    with pytest.raises(InputError, match="1:3 keeps 3 attention layers, but the constraints allow 4 to 12"):
        SearchSpace(12, ("1:3",), keep_attention=frozenset(range(4)))
