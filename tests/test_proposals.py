"""What Tune tries next: each layout once, whatever the sampler says and however many sessions there are."""

import itertools
import warnings

import numpy as np
import optuna
import pytest
from ray.tune.search import Searcher

from mamtra_ray.config import SearchConfig
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.candidates import Candidate, SearchSpace
from mamtra_ray.search.parameter_space import params_from_layout, sampler
from mamtra_ray.search.proposals import LayoutProposals, UniformLayouts
from mamtra_ray.search.tuning import new_study, objectives

warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
optuna.logging.set_verbosity(optuna.logging.ERROR)


def all_layouts(space: SearchSpace) -> set[Layout]:
    """By brute force."""
    every = (Layout("".join(letters)) for letters in itertools.product("AM", repeat=space.num_layers))
    return {layout for layout in every if space.allows(layout)}


def score(layout: Layout) -> float:
    """Early attention matters most, so a sampler that has learned that proposes the same few layouts."""
    return float(sum((1 - layer / layout.num_layers) ** 2 for layer in layout.mamba_layers))


def searched(space, kind, trials, known=(), seed=0):
    """A session: the layouts that were tried, in order, with their scores told."""
    several = len(space.ratios) > 1
    study = optuna.create_study(sampler=sampler(kind, seed + len(known)), directions=["minimize"] * (1 + several))
    proposals = LayoutProposals(
        space,
        [Candidate(layout, "known") for layout in known],
        study,
        ["ce", "cost"] if several else ["ce"],
        seed,
        asks_study=kind != "random",
    )
    tried = []
    for index in range(trials):
        params = proposals.suggest(str(index))
        if params == Searcher.FINISHED:
            break
        layout = Layout(params["layout"])
        tried.append(layout)
        proposals.on_trial_complete(str(index), {"ce": score(layout), "cost": layout.num_attention})
    told = [one for one in study.trials if one.state == optuna.trial.TrialState.COMPLETE]
    assert [one.user_attrs["layout"] for one in told] == [str(layout) for layout in tried]
    assert [one.values[0] for one in told] == [score(layout) for layout in tried]
    return tried


@pytest.mark.parametrize(
    ("layers", "ratios", "kind", "trials"),
    [
        (12, ("1:1",), "tpe", 40),
        (12, ("1:11",), "tpe", 12),
        (12, ("1:11",), "random", 12),
        (12, ("1:11",), "nsga2", 12),
        (24, ("1:11",), "tpe", 64),
        (12, ("1:1", "1:5"), "tpe", 30),
        (4, ("1:3", "1:1"), "random", 10),
    ],
)
def test_as_many_layouts_as_trials_while_there_are_any(layers, ratios, kind, trials):
    space = SearchSpace(layers, ratios)
    tried = searched(space, kind, trials)
    assert len(set(tried)) == len(tried) == trials
    assert all(space.allows(layout) for layout in tried)


@pytest.mark.parametrize("kind", ["tpe", "nsga2", "random"])
def test_a_later_session_tries_what_no_session_has_tried(kind):
    space = SearchSpace(12, ("1:5",))
    first = searched(space, kind, 20)
    both = searched(space, kind, 50, known=first)
    assert both[:20] == first, "what is known comes first, and tells the sampler its history"
    assert len(set(both)) == 50


def test_uniform_draws_of_a_stopped_search_are_those_of_one_that_was_not():
    space = SearchSpace(12, ("1:1", "1:3"))
    whole = searched(space, "random", 30)
    # Stopped while the eleventh and the twelfth were not finished, of which the twelfth has left a row.
    known = [*whole[:10], whole[11]]
    assert set(searched(space, "random", 30, known=known)) == set(whole)


@pytest.mark.parametrize("kind", ["tpe", "random"])
def test_when_every_layout_has_been_tried_the_proposals_end(kind):
    space = SearchSpace(6, ("1:1", "1:5"), keep_attention=frozenset({0}), always_mamba=frozenset({5}))
    assert set(searched(space, kind, 100)) == all_layouts(space)
    assert len(all_layouts(space)) == space.num_layouts == 6 + 1


class Insists(optuna.samplers.BaseSampler):
    """Proposes one layout again and again."""

    def __init__(self, params):
        self.params = params

    def infer_relative_search_space(self, study, trial):
        return {}

    def sample_relative(self, study, trial, search_space):
        return {}

    def sample_independent(self, study, trial, param_name, param_distribution):
        return self.params[param_name]


def test_a_sampler_that_insists_is_overruled_inside_its_ratio():
    space = SearchSpace(8, ("1:1", "1:3"))
    study = optuna.create_study(sampler=Insists(params_from_layout(Layout("AAMMMMMM"), space)), directions=["minimize"])
    proposals = LayoutProposals(space, [], study, ["ce"], 0, asks_study=True)
    tried = [Layout(proposals.suggest(str(index))["layout"]) for index in range(29)]
    assert tried[0] == Layout("AAMMMMMM") and len(set(tried)) == 29
    assert [layout.num_attention for layout in tried] == [2] * 28 + [4], "another ratio only when this one is used up"


def test_a_trial_that_failed_is_told_as_failed():
    study = optuna.create_study(sampler=sampler("tpe", 0))
    proposals = LayoutProposals(SearchSpace(4, ("1:1",)), [], study, ["ce"], 0, asks_study=True)
    for trial_id, result in (("a", None), ("b", {"done": True})):
        proposals.suggest(trial_id)
        proposals.on_trial_complete(trial_id, result, error=result is None)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "FAIL"]


def test_a_trial_that_never_spoke_stands_for_no_wer():
    """Optuna's samplers see the heard trials only; the surrogate knows the layout and its KL all the same."""
    study = optuna.create_study(directions=["minimize"] * 2)
    metrics = objectives(SearchConfig(objectives=("ce", "wer"), sentences=4))
    assert metrics == ["first_rung_ce", "wer"]
    proposals = LayoutProposals(SearchSpace(4, ("1:1",)), [], study, metrics, 0, asks_study=False)
    heard, silent = ({"first_rung_ce": 1.0, "first_rung_kl": 0.1, **more} for more in ({"wer": 0.0}, {"wer": None}))
    for trial_id, result in (("a", heard), ("b", silent), ("c", {**silent, "first_rung_kl": 0.3})):
        proposals.suggest(trial_id)
        proposals.on_trial_complete(trial_id, result)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "FAIL"]
    assert [trial.values for trial in study.best_trials] == [[1.0, 0.0]]
    assert [trial.user_attrs.get("wer") for trial in study.trials] == [0.0, None, None]
    assert [trial.user_attrs["first_rung_kl"] for trial in study.trials] == [0.1, 0.1, 0.3]


def test_uniform_draws_are_uniform():
    space = SearchSpace(6, ("1:1", "1:5"))
    draws = UniformLayouts(space, 0)
    counts = {}
    for _ in range(6000):
        layout = draws.next_untried(set())
        counts[layout] = counts.get(layout, 0) + 1
    for kept, expected in ((3, 3000 / 20), (1, 3000 / 6)):
        found = np.array([count for layout, count in counts.items() if layout.num_attention == kept])
        assert len(found) == space.num_layouts_of(kept)
        # Pearson's statistic; its mean is the number of layouts less one, its deviation about twice the root of that.
        assert ((found - expected) ** 2 / expected).sum() < len(found) + 5 * np.sqrt(2 * len(found))


def test_the_journal_says_what_every_trial_is_and_what_came_of_it(tmp_path):
    """Read by Optuna alone, as its dashboard does."""
    study = new_study(tmp_path, sampler("random", 0), ["CE after the first rung", "cache_bytes"])
    space = SearchSpace(4, ("1:1", "1:3"))
    candidates = [Candidate(Layout("AAMM"), "block_beginning"), Candidate(Layout("MMMA"), "probe")]
    proposals = LayoutProposals(space, candidates, study, ["first_rung_ce", "cost"], 0, asks_study=False)
    tried = [proposals.suggest(name)["layout"] for name in "abcd"]
    first = {"rung": 0, "tokens": 100, "ce": 2.0, "kl": 0.5, "first_rung_ce": 2.0, "first_rung_kl": 0.5, "cost": 3.0}
    heard = {"wer": 0.25, "wer_low": 0.125, "wer_high": 0.5, "token_error_rate": 0.75}
    last = first | {"rung": 1, "tokens": 200, "ce": 1.5, "kl": 0.25} | heard
    for name, results in {"a": [first, last], "b": [first]}.items():
        for result in results:
            proposals.on_trial_result(name, result)
        proposals.on_trial_complete(name, results[-1])
    proposals.on_trial_result("c", first)
    proposals.on_trial_complete("d", None, error=True)

    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "optuna.journal"))
    read = optuna.load_study(study_name="layouts", storage=optuna.storages.JournalStorage(backend))
    assert read.metric_names == ["CE after the first rung", "cache_bytes"]
    assert [one.state.name for one in read.trials] == ["COMPLETE", "COMPLETE", "RUNNING", "FAIL"]
    assert [one.values for one in read.trials[:2]] == [[2.0, 3.0], [2.0, 3.0]]
    attributes = [one.user_attrs for one in read.trials]
    assert [one["layout"] for one in attributes] == tried
    assert [one["ratio"] for one in attributes] == [Layout(layout).ratio for layout in tried]
    assert [one["origin"] for one in attributes] == ["block_beginning", "probe", "optuna", "optuna"]
    shown = ("rung", "tokens", "ce", "kl", "wer", "wer_low", "wer_high", "token_error_rate")
    assert [attributes[0][name] for name in shown] == [1, 200, 1.5, 0.25, 0.25, 0.125, 0.5, 0.75]
    assert [attributes[2].get(name) for name in shown] == [0, 100, 2.0, 0.5, None, None, None, None]
    assert attributes[0]["first_rung_kl"] == 0.5, "the sampler goes on from the first rung"
