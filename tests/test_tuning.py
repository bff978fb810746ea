"""Successive halving inside each ratio, against its definition."""

from dataclasses import replace
from types import SimpleNamespace

from ray.tune.schedulers import TrialScheduler
from test_trial_table import score

from mamtra_ray.config import SearchConfig
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.candidates import Candidate, SearchSpace
from mamtra_ray.search.trial_phase import every_trial_is_finished
from mamtra_ray.search.tuning import HalvingInsideRatios, TrialPlan, death_reason

CONTINUE, STOP = TrialScheduler.CONTINUE, TrialScheduler.STOP


def decisions(search, results):
    """What the scheduler says at the first rung to trials that report (layout, CE) one after the other."""
    scheduler = HalvingInsideRatios(search, SearchSpace(4, search.ratios))
    found = []
    for index, (layout, ce) in enumerate(results):
        trial = SimpleNamespace(trial_id=str(index), config={"layout": layout})
        scheduler.on_trial_add(None, trial)
        found.append(scheduler.on_trial_result(None, trial, {"milestone": 1, "ce": ce}))
        scheduler.on_trial_complete(None, trial, {"milestone": 1, "ce": ce})
    return found


def test_a_layout_is_compared_with_those_of_its_own_ratio():
    """Every layout at 1:3 is worse than every one at 1:1; the better half of each must still go on."""
    search = SearchConfig(ratios=("1:1", "1:3"), rung_tokens=(10, 20))
    results = [("AAMM", 1.20), ("AMMM", 1.40), ("AMAM", 1.25), ("MAMM", 1.45), ("AMMA", 1.19), ("MMAM", 1.39)]
    assert decisions(search, results) == [CONTINUE, CONTINUE, STOP, STOP, CONTINUE, CONTINUE]


def test_layouts_of_one_ratio_are_compared():
    search = SearchConfig(ratios=("1:3",), rung_tokens=(10, 20))
    assert decisions(search, [("AMMM", 1.4), ("MAMM", 1.5), ("MMAM", 1.3)]) == [CONTINUE, STOP, CONTINUE]


def test_why_tune_gave_up_a_trial(tmp_path):
    dead, other = tmp_path / "dead.txt", tmp_path / "other.txt"
    dead.write_text(
        "Failure # 8\nThe actor died unexpectedly before finishing this task.\n\tclass_name: ImplicitFunc\n"
    )
    other.write_text("Traceback\n  ...\nValueError: no such   thing\n")
    for file in (None, str(tmp_path / "missing"), str(dead)):
        assert death_reason(file) == "its process or node ended 4 times"
    assert death_reason(str(other)) == "ValueError: no such thing"


def test_tune_is_not_started_where_nothing_is_left_to_try():
    def rows(**status_of: str) -> list:
        return [replace(score(layout, 0), status=status) for layout, status in status_of.items()]

    plan = TrialPlan([Candidate(Layout("AM"), "front"), Candidate(Layout("MA"), "back")], num_known=2, total=2)
    assert every_trial_is_finished(plan, rows(AM="finished", MA="finished"))
    assert not every_trial_is_finished(plan, rows(AM="finished", MA="running"))
    assert not every_trial_is_finished(plan, rows(AM="finished")), "one has failed before, and is tried again"
    assert not every_trial_is_finished(replace(plan, total=3), rows(AM="finished", MA="finished"))
