"""The surrogate and its exact minimum, against brute force and against functions that are known."""

import itertools

import numpy as np
import pytest

from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.constraints import Constraints, LinearCost, layouts_to_matrix, sample_layouts
from mamtra_ray.surrogate import optimum
from mamtra_ray.surrogate.mixed_integer import solve_with_milp
from mamtra_ray.surrogate.optimum import best_layouts, enumerate_layouts
from mamtra_ray.surrogate.quadratic import Quadratic
from mamtra_ray.surrogate.surrogate import fit_surrogate


def random_quadratic(num_layers, seed=0):
    rng = np.random.default_rng(seed)
    distance = np.abs(np.subtract.outer(np.arange(num_layers), np.arange(num_layers)))
    pairs = np.triu(rng.normal(size=(num_layers, num_layers)), 1) * 0.15 * np.exp(-(distance - 1) / 2)
    return Quadratic(-3.0, 0.2 + 0.15 * rng.normal(size=num_layers), pairs)


def every_layout(num_layers):
    return [Layout("".join(letters)) for letters in itertools.product("AM", repeat=num_layers)]


def plain_value(quadratic, layout):
    """The definition, written as loops."""
    mamba = layout.mamba_layers
    value = quadratic.constant + sum(quadratic.linear_L[i] for i in mamba)
    return value + sum(quadratic.pairs_LL[i, j] for i, j in itertools.combinations(mamba, 2))


def brute_force(quadratic, constraints):
    """attention layers -> all allowed values, ascending."""
    values = {}
    for layout in every_layout(quadratic.num_layers):
        if constraints.allows(layout):
            values.setdefault(len(layout.attention_layers), []).append(plain_value(quadratic, layout))
    return {count: sorted(found) for count, found in values.items()}


COST = LinearCost("cache_bytes", 100.0, (-5.0, -7.0, -5.0, -6.0, -5.0, -3.0, -5.0, -9.0, -1.0))


@pytest.mark.parametrize(
    "constraints",
    [
        Constraints(9),
        Constraints(9, keep_attention=(0, 8)),
        Constraints(9, always_mamba=(3,), max_attention=4),
        Constraints(9, keep_attention=(2,), always_mamba=(0, 1), min_attention=3, max_attention=3),
        Constraints(9, max_cost=78.0, cost=COST),
        Constraints(9, keep_attention=(7,), always_mamba=(4,), max_cost=81.0, cost=COST),
    ],
)
def test_enumeration_finds_the_best_layouts_of_every_budget(constraints):
    quadratic = random_quadratic(9)
    expected = brute_force(quadratic, constraints)
    found = enumerate_layouts(quadratic, constraints, count=5)
    assert set(found) == set(expected)
    for budget, optima in found.items():
        np.testing.assert_allclose([o.value for o in optima], expected[budget][:5], rtol=0, atol=1e-12)
        for found_one in optima:
            assert constraints.allows(found_one.layout) and len(found_one.layout.attention_layers) == budget
            assert plain_value(quadratic, found_one.layout) == pytest.approx(found_one.value, abs=1e-12)


@pytest.mark.parametrize("max_cost", [None, 80.0])
def test_milp_proves_the_same_optimum_as_brute_force(max_cost):
    quadratic = random_quadratic(9, seed=3)
    constraints = Constraints(9, keep_attention=(1,), max_cost=max_cost, cost=COST)
    expected = brute_force(quadratic, constraints)
    for budget in constraints.attention_counts:
        best = solve_with_milp(quadratic, constraints, budget)
        if budget not in expected:
            assert best is None
            continue
        assert best.value == pytest.approx(expected[budget][0], abs=1e-9)
        assert best.gap == 0 and constraints.allows(best.layout)


def test_a_model_too_large_to_enumerate_gets_a_proven_bound():
    quadratic = random_quadratic(48, seed=1)
    constraints = Constraints(48, keep_attention=(0,), min_attention=12, max_attention=12)
    assert constraints.num_layouts > 2**31
    [best] = best_layouts(quadratic, constraints, time_limit=20)[12]
    assert constraints.allows(best.layout)
    assert best.gap < 0.01
    rng = np.random.default_rng(0)
    others = sample_layouts(constraints, 500, rng)
    assert quadratic(layouts_to_matrix(others, 48)).min() >= best.bound


@pytest.mark.parametrize("solver", ["enumeration", "milp"])
def test_the_best_of_what_is_left_equals_brute_force(solver, monkeypatch):
    """Scored layouts are excluded; a model too large to enumerate must get the next best ones, not none."""
    if solver == "milp":
        monkeypatch.setattr(optimum, "ENUMERATION_LIMIT", 0)
    quadratic = random_quadratic(9, seed=5)
    constraints = Constraints(9, keep_attention=(0,), always_mamba=(4, 4), min_attention=5, max_attention=5)
    allowed = [layout for layout in every_layout(9) if constraints.allows(layout)]
    allowed.sort(key=lambda layout: plain_value(quadratic, layout))
    excluded = [allowed[0], allowed[2], allowed[3], *[x for x in every_layout(9) if not constraints.allows(x)][:5]]
    [found] = best_layouts(quadratic, constraints, 4, exclude=excluded).values()
    assert [o.layout for o in found] == [allowed[place] for place in (1, 4, 5, 6)]
    assert all(o.gap == 0 for o in found)
    assert best_layouts(quadratic, constraints, 4, exclude=allowed) == {}
    [last] = best_layouts(quadratic, constraints, 4, exclude=allowed[:-1]).values()
    assert [o.layout for o in last] == allowed[-1:]


def test_a_weighted_trade_off_is_the_optimum_of_the_weighted_sum():
    quadratic, weight = random_quadratic(9), 0.03
    found = best_layouts(quadratic.plus(np.array(COST.change_L), weight), Constraints(9))
    best = min((optima[0] for optima in found.values()), key=lambda o: o.value)
    by_hand = min(every_layout(9), key=lambda x: plain_value(quadratic, x) + weight * (COST.of(x) - COST.all_attention))
    assert best.layout == by_hand


def test_linear_cost_is_read_off_a_function_and_refuses_another_kind():
    assert LinearCost.from_function("cost", COST.of, 9).of(Layout("AMMAAMMAM")) == COST.of(Layout("AMMAAMMAM"))
    with pytest.raises(InputError, match="does not add up"):
        LinearCost.from_function("squared", lambda layout: len(layout.mamba_layers) ** 2, 9)


def test_fit_predicts_held_out_layouts_and_knows_its_error():
    truth, rng = random_quadratic(12), np.random.default_rng(1)
    layouts = sample_layouts(Constraints(12), 140, rng)
    others = sample_layouts(Constraints(12), 300, rng, exclude=layouts)
    noise = 0.02
    values = truth(layouts_to_matrix(layouts, 12)) + noise * rng.normal(size=len(layouts))
    actual = truth(layouts_to_matrix(others, 12)) + noise * rng.normal(size=len(others))
    surrogate = fit_surrogate(layouts, values)
    mean, deviation = surrogate.predict(others)
    assert np.corrcoef(mean, actual)[0, 1] > 0.99
    inside = np.mean(np.abs(actual - mean) < 1.645 * deviation)
    assert 0.82 < inside < 0.98  # nominal 0.90
    np.testing.assert_allclose(surrogate.mean(layouts_to_matrix(others, 12)), mean, atol=1e-9)


def test_held_out_fit_equals_refitting_without_the_layout():
    """With the prior variances kept, leaving a score out must give the closed form's prediction."""
    truth, rng = random_quadratic(8), np.random.default_rng(2)
    layouts = sample_layouts(Constraints(8, min_attention=4, max_attention=4), 30, rng)
    values = truth(layouts_to_matrix(layouts, 8)) + 0.05 * rng.normal(size=30)
    surrogate = fit_surrogate(layouts, values)
    features, prior = surrogate._features_BF, surrogate._prior.times(np.eye(surrogate._features_BF.shape[1]))
    errors = []
    for left_out in range(30):
        rest = np.arange(30) != left_out
        covariance = features[rest] @ prior @ features[rest].T + surrogate.noise * np.eye(29)
        predicted = (
            features[left_out] @ prior @ features[rest].T @ np.linalg.solve(covariance, surrogate._target_B[rest])
        )
        errors.append(surrogate._scale * (surrogate._target_B[left_out] - predicted))
    fit = surrogate.held_out_fit()[4]
    assert fit.rmse == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=1e-6)
    assert fit.layouts == 30 and fit.spearman > 0.5


def test_posterior_samples_have_the_predicted_mean_and_deviation():
    truth, rng = random_quadratic(8), np.random.default_rng(4)
    layouts = sample_layouts(Constraints(8), 25, rng)
    surrogate = fit_surrogate(layouts, truth(layouts_to_matrix(layouts, 8)))
    others = sample_layouts(Constraints(8), 20, rng, exclude=layouts)
    mean, deviation = surrogate.predict(others)
    samples = np.array([surrogate.sample(rng)(layouts_to_matrix(others, 8)) for _ in range(2000)])
    without_noise = np.sqrt(deviation**2 - surrogate.noise * surrogate._scale**2)
    np.testing.assert_allclose(samples.std(axis=0), without_noise, rtol=0.1)
    assert np.all(np.abs(samples.mean(axis=0) - mean) < 5 * without_noise / np.sqrt(2000))


def test_budgets_are_sampled_uniformly_and_constraints_kept():
    constraints = Constraints(12, keep_attention=(0,), always_mamba=(11,))
    layouts = sample_layouts(constraints, 400, np.random.default_rng(0))
    assert len(set(layouts)) == 400 and all(constraints.allows(layout) for layout in layouts)
    counts = np.bincount([len(layout.attention_layers) for layout in layouts], minlength=12)
    # 11 budgets; the extreme ones have only 1 and 10 layouts. Coin flips would take 18 of 400 with 3 or 9.
    assert counts[1] == 1 and counts[11] == 1 and counts[2] == 10
    assert counts[3] + counts[9] > 55


def test_sampling_ends_when_nothing_new_is_left():
    constraints = Constraints(4, min_attention=2, max_attention=2)
    assert len(sample_layouts(constraints, 100, np.random.default_rng(0))) == 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constraints(12, keep_attention=(3,), always_mamba=(3,)), "layer 3 cannot both"),
        (lambda: Constraints(12, keep_attention=(12,)), "layers go from 0 to 11"),
        (lambda: Constraints(12, keep_attention=(0, 1, 2), max_attention=2), "no layout has 0 to 2 attention layers"),
        (lambda: Constraints(9, max_cost=10.0, cost=COST), "the cheapest allowed one has 54"),
        (lambda: Constraints(12).allows(Layout("AM")), "layout AM has 2 layers, the model has 12"),
        (lambda: Constraints.from_ratio(12, "1:6"), "ratio 1:6 does not fit 12 layers"),
        (lambda: fit_surrogate([Layout("AM"), Layout("MA"), Layout("MM")], [1.0, np.nan, 2.0]), "layout MA is not"),
        (lambda: fit_surrogate([Layout("AM")], [1.0]), "at least 3"),
        (lambda: fit_surrogate([Layout("AM"), Layout("MAM"), Layout("MM")], [1, 2, 3]), "layout MAM has 3 layers"),
    ],
)
def test_what_cannot_be_met_is_one_sentence(make, message):
    with pytest.raises(InputError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
