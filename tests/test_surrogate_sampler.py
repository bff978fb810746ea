"""The sampler ``surrogate``: against brute force over all layouts of spaces small enough for it."""

import itertools

import numpy as np
import optuna
import pytest
from scipy.stats import linregress

from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.candidates import Candidate, SearchSpace
from mamtra_ray.search.proposals import LayoutProposals
from mamtra_ray.search.surrogate_sampler import SurrogateSampler, line

optuna.logging.set_verbosity(optuna.logging.ERROR)


def layouts_of(space: SearchSpace) -> list[Layout]:
    every = (Layout("".join(letters)) for letters in itertools.product("AM", repeat=space.num_layers))
    return [layout for layout in every if space.allows(layout)]


class World:
    """KLs of all layouts, as a probe sees them and as they are after the first rung."""

    def __init__(self, space: SearchSpace, seed: int, agreement: float) -> None:
        """``agreement`` is the weight of what both have in common."""
        rng = np.random.default_rng(seed)
        layers = space.num_layers
        common, own = rng.normal(size=(2, layers)) * 0.5
        pairs = np.triu(rng.normal(size=(layers, layers)) * 0.15, 1)
        self.probe, self.trained = {}, {}
        for layout in layouts_of(space):
            x = np.array([letter == "M" for letter in str(layout)], dtype=float)
            probed = float(common @ x + x @ pairs @ x)
            trained = agreement * probed + (1 - agreement) * float(own @ x) * 3 + rng.normal() * 0.02
            self.probe[layout] = float(np.exp(probed - 1))
            self.trained[layout] = float(np.exp(0.7 * trained - 2))


def searched(space, world, probe, trials, known=(), seed=0):
    """Layouts in the order in which they were tried; all of ``known`` first, as after a stop."""
    study = optuna.create_study(
        sampler=SurrogateSampler(space, probe, seed), directions=["minimize"] * (1 + (len(space.ratios) > 1))
    )
    metrics = ["first_rung_ce", "cost"] if len(space.ratios) > 1 else ["first_rung_ce"]
    proposals = LayoutProposals(space, [Candidate(x, "known") for x in known], study, metrics, seed, asks_study=True)
    tried = []
    for index in range(trials):
        layout = Layout(proposals.suggest(str(index))["layout"])
        tried.append(layout)
        kl = world.trained[layout]
        scores = {"first_rung_ce": 1 + kl, "first_rung_kl": kl, "cost": layout.num_attention}
        proposals.on_trial_complete(str(index), scores)
    assert not any("repeats" in trial.user_attrs for trial in study.trials), "it proposed what was tried"
    return tried


def probed(world, count, seed=0):
    layouts = sorted(world.probe)
    chosen = np.random.default_rng(seed).choice(len(layouts), count, replace=False)
    return {layouts[index]: world.probe[layouts[index]] for index in chosen}


@pytest.mark.parametrize("seed", range(4))
def test_with_a_probe_that_agrees_the_best_layouts_are_tried_at_once(seed):
    space = SearchSpace(10, ("1:1",))
    world = World(space, seed, agreement=1.0)
    tried = searched(space, world, probed(world, 120), 6)
    best = sorted(world.trained, key=world.trained.__getitem__)
    assert min(best.index(layout) for layout in tried) <= 2, "of 252"


@pytest.mark.parametrize("agreement", [0.0, 0.4])
def test_where_the_probe_misjudges_the_trials_correct_it(agreement):
    """Mean rank of what it finds, beside the probe's own ranking and beside chance, over worlds."""
    space = SearchSpace(10, ("1:1",))
    found, by_probe, by_chance = [], [], []
    for seed in range(6):
        world = World(space, seed, agreement)
        ranked = sorted(world.trained, key=world.trained.__getitem__)
        tried = searched(space, world, probed(world, 120, seed), 40, seed=seed)
        found.append(min(ranked.index(layout) for layout in tried))
        probe_first = sorted(world.probe, key=world.probe.__getitem__)[:40]
        by_probe.append(min(ranked.index(layout) for layout in probe_first))
        drawn = np.random.default_rng(seed).choice(len(ranked), (200, 40))
        by_chance.append(float(np.mean(drawn.min(axis=1))))
    assert np.mean(found) < np.mean(by_probe) / 2 and np.mean(found) < np.mean(by_chance) / 2
    assert np.mean(found) <= 1


def test_without_a_probe_it_learns_from_the_trials_alone():
    space = SearchSpace(10, ("1:1",))
    world = World(space, 1, agreement=1.0)
    tried = searched(space, world, {}, 60)
    ranked = sorted(world.trained, key=world.trained.__getitem__)
    assert min(ranked.index(layout) for layout in tried) <= 2
    late = np.mean([ranked.index(layout) for layout in tried[30:]])
    assert late < np.mean([ranked.index(layout) for layout in tried[:5]])


def test_what_is_heard_corrects_what_the_kl_says():
    """Of a world whose KL after the first rung says little of the WER, and where every second trial is heard."""
    space = SearchSpace(10, ("1:1",))
    ranks = {False: [], True: []}
    for seed in range(6):
        world, spoken = World(space, seed, agreement=0.8), World(space, 100 + seed, agreement=1.0).trained
        ranked = sorted(spoken, key=spoken.__getitem__)
        for hears, found in ranks.items():
            study = optuna.create_study(sampler=SurrogateSampler(space, probed(world, 80), seed, hears=hears))
            proposals = LayoutProposals(space, [], study, ["first_rung_ce"], seed, asks_study=True)
            tried = []
            for index in range(50):
                layout = Layout(proposals.suggest(str(index))["layout"])
                wer = {"wer": spoken[layout]} if index % 2 == 0 else {}
                kl = world.trained[layout]
                proposals.on_trial_complete(str(index), {"first_rung_ce": 1 + kl, "first_rung_kl": kl, **wer})
                tried.append(ranked.index(layout))
            found.append(min(tried[20:]))
    assert np.mean(ranks[True]) < np.mean(ranks[False]) / 2
    assert np.median(ranks[True]) <= 3, "of 252"


def test_ratios_take_turns_until_one_is_used_up():
    space = SearchSpace(8, ("1:1", "1:7"), keep_attention=frozenset({0}))
    world = World(space, 0, agreement=1.0)
    assert space.num_layouts == 35 + 1
    tried = searched(space, world, probed(world, 20), 36)
    assert [layout.num_attention for layout in tried[:4]] == [4, 1, 4, 4]
    assert set(tried) == set(layouts_of(space))


def test_the_same_trials_lead_to_the_same_proposal_in_whatever_session():
    space = SearchSpace(10, ("1:1", "1:4"))
    world = World(space, 3, agreement=0.5)
    probe = probed(world, 60)
    whole = searched(space, world, probe, 24)
    assert searched(space, world, probe, 24, known=whole[:11]) == whole
    assert len(set(whole)) == 24


def test_the_line_between_probe_and_trials_is_drawn_towards_one():
    rng = np.random.default_rng(0)
    before = rng.normal(size=200)
    after = 0.4 * before + 2 + 0.01 * rng.normal(size=200)
    slope, intercept = line(before, after)
    expected = linregress(before, after)
    assert slope == pytest.approx(expected.slope, abs=5e-3) and intercept == pytest.approx(expected.intercept, abs=5e-3)
    few, _ = line(before[:2], after[:2])
    assert 0.4 < few < 1
    assert line(np.ones(3), np.array([2.0, 3.0, 4.0])) == (1.0, 2.0)
