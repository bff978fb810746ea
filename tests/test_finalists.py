"""Who is distilled longer, and who of them is exported."""

import dataclasses
import math
from types import SimpleNamespace

import pytest

from mamtra_ray.config import DistillConfig, SearchConfig, StudentConfig
from mamtra_ray.distill.job import DistillData, DistillJob, Report
from mamtra_ray.errors import InputError
from mamtra_ray.evaluate.run_scores import choose_best
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.candidates import Candidate, SearchSpace, given_candidates, paper_candidates
from mamtra_ray.run.rows import FinalistRow, TrialRow
from mamtra_ray.search import finalists
from mamtra_ray.search.finalists import choose_finalists, distill_finalist
from mamtra_ray.speech.error_rate import ErrorRate

COSTS = {"cache_bytes": 1.0, "decode_flops": 1.0, "parameters": 1.0}


def row(layout: str, rung: int, ce: float, origin: str = "optuna") -> TrialRow:
    measured = {"tokens": 1, "seconds": 1.0, "tokens_per_second": 1.0, "data_wait_fraction": 0.0, "kl": 0.1}
    known = {"ce_start": 2.0, "kl_start": 1.0, "status": "finished", "settings_hash": "s", "trial_id": "t", **COSTS}
    return TrialRow(layout=Layout(layout), rung=rung, ce=ce, origin=origin, **measured, **known)


def finalist(layout: str, ce: float, wer: ErrorRate | None = None, alarm: str | None = None) -> FinalistRow:
    trained = {"origin": "optuna", "tokens": 1, "steps": 1, "seconds": 1.0, "kl": 0.1, "ce_start": 2.0, "kl_start": 0.5}
    return FinalistRow(layout=Layout(layout), ce=ce, wer=wer, alarm=alarm, **trained, **COSTS)


def test_papers_layouts_and_the_best_found_of_every_ratio_go_on():
    rows = [
        row("AMAM", 0, 1.0, "block_beginning"),  # the paper's: in any case, and never as a found one
        row("MMAA", 0, 9.0, "back"),
        row("AAMM", 0, 1.5),
        row("AAMM", 1, 1.4),
        row("AMMA", 0, 1.1),  # lower CE, but stopped at the first rung
        row("AMMM", 0, 2.0, "probe"),
        row("MAMM", 0, 2.5),
    ]
    space = SearchSpace(4, ("1:1", "1:3"))
    chosen = choose_finalists(space, paper_candidates(space, ("block_beginning", "back")), rows, 1)
    own = choose_finalists(space, given_candidates(space, ("back",), ("AMMA",)), rows, 1)
    assert own[0] == Candidate(Layout("AMMA"), "own"), "it is distilled long whatever its short score"
    assert sorted((str(candidate.layout), candidate.origin) for candidate in chosen) == [
        ("AAMM", "optuna"),
        ("AMAM", "block_beginning"),
        ("AMMM", "block_beginning"),  # proposed by the probe as well, but it is the paper's at 1:3
        ("MAMM", "optuna"),
        ("MMAA", "back"),
        ("MMMA", "back"),
    ]


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        # WER intervals overlap: the lower CE wins.
        ([("AM", 1.2, ErrorRate(0.10, 0.05, 0.15)), ("MA", 1.1, ErrorRate(0.12, 0.05, 0.18))], "MA"),
        # The second's WER is worse than the first's interval: its lower CE does not help.
        ([("AM", 1.2, ErrorRate(0.10, 0.05, 0.15)), ("MA", 1.1, ErrorRate(0.30, 0.2, 0.40))], "AM"),
        # Nothing was heard: CE alone.
        ([("AM", 1.2, None), ("MA", 1.1, None)], "MA"),
    ],
)
def test_wer_rules_out_and_ce_decides(rows, best):
    assert choose_best([finalist(*one) for one in rows]).layout == Layout(best)


def test_a_finalist_with_an_alarm_is_chosen_only_where_all_have_one():
    rows = [
        finalist("AAM", 1.0, ErrorRate(0.01, 0.0, 0.02), "does not stop"),
        finalist("AMA", 1.2, ErrorRate(0.10, 0.05, 0.15)),
        finalist("MAA", 1.1, ErrorRate(0.12, 0.05, 0.18)),
    ]
    assert choose_best(rows).layout == Layout("MAA")
    alarmed = [dataclasses.replace(one, alarm="stops at once") for one in rows]
    assert choose_best(alarmed).layout == Layout("AAM")
    # A CE that is no number is below nothing.
    unheard = [finalist("AM", math.nan), finalist("MA", 1.2)]
    assert choose_best(unheard).layout == choose_best(unheard[::-1]).layout == Layout("MA")


def settings_with(distill: DistillConfig, calls: list) -> SimpleNamespace:
    """What `distill_finalist` needs of a search, with a cache that says what it is and holds nothing."""
    cache = SimpleNamespace(
        manifest=SimpleNamespace(made_by={"corpus": "c", "format": {}, "selection": {}}), speech_tokens=10
    )
    data = DistillData(SimpleNamespace(fingerprint="t"), cache, cache, None)
    return SimpleNamespace(
        settings=distill,
        search=SearchConfig(),
        student=StudentConfig(initialization="transfer"),
        data=data,
        seed=0,
        worker=None,
        table=SimpleNamespace(end_progress=SimpleNamespace(remote=lambda *_: None)),
        job=lambda layout, report_at, progress=None: DistillJob(layout, distill, StudentConfig(), data, report_at),
    )


def test_a_finished_finalist_is_read_back_and_only_that_one(tmp_path, monkeypatch):
    """A loss term that is switched off is NaN, which a JSON file cannot hold: it must still be read back."""
    point = {"step": 1, "tokens": 10, "total": 1.0, "ce": math.nan, "kl": 0.5, "hidden": 0.5}
    trained, calls = Report("AM", 10, 1, 1.0, 10.0, 0.0, 1.5, 0.2, 2.0, 0.5, [point]), []
    monkeypatch.setattr(finalists, "distill_on_workers", lambda *_, **__: calls.append(1) or trained)
    monkeypatch.setattr(finalists, "result_of", lambda value: value)

    def distilled(**changes):
        settings = settings_with(DistillConfig(tokens=10, **changes), calls)
        return distill_finalist(settings, Layout("AM"), tmp_path)

    assert [distilled().ce, distilled().ce] == [1.5, 1.5] and calls == [1]
    # What changes no weight by more than rounding is no reason to train again, nor to refuse.
    assert distilled(workers=4, checkpoint_every_tokens=3).ce == 1.5 and calls == [1]
    with pytest.raises(InputError, match="distilled with another settings"):
        distilled(learning_rate=0.5)
