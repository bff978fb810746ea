"""Successive halving inside each ratio, against its definition."""

from types import SimpleNamespace

from ray.tune.schedulers import TrialScheduler

from mamtra_ray.config import SearchConfig
from mamtra_ray.search.tuning import HalvingInsideRatios

CONTINUE, STOP = TrialScheduler.CONTINUE, TrialScheduler.STOP


def decisions(search, results):
    """What the scheduler says at the first rung to trials that report (ratio, CE) one after the other."""
    scheduler = HalvingInsideRatios(search)
    found = []
    for index, (ratio, ce) in enumerate(results):
        trial = SimpleNamespace(trial_id=str(index), config={"ratio": ratio} if len(search.ratios) > 1 else {})
        scheduler.on_trial_add(None, trial)
        found.append(scheduler.on_trial_result(None, trial, {"milestone": 1, "ce": ce}))
        scheduler.on_trial_complete(None, trial, {"milestone": 1, "ce": ce})
    return found


def test_a_layout_is_compared_with_those_of_its_own_ratio():
    """Every layout at 1:3 is worse than every one at 1:1; the better half of each must still go on."""
    search = SearchConfig(ratios=("1:1", "1:3"), rung_tokens=(10, 20))
    results = [("1:1", 1.20), ("1:3", 1.40), ("1:1", 1.25), ("1:3", 1.45), ("1:1", 1.19), ("1:3", 1.39)]
    assert decisions(search, results) == [CONTINUE, CONTINUE, STOP, STOP, CONTINUE, CONTINUE]


def test_one_ratio_has_no_parameter_for_it():
    search = SearchConfig(ratios=("1:3",), rung_tokens=(10, 20))
    assert decisions(search, [("1:3", 1.4), ("1:3", 1.5), ("1:3", 1.3)]) == [CONTINUE, STOP, CONTINUE]
