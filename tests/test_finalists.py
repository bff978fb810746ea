"""Who is distilled longer, and who of them is exported."""

import math
from types import SimpleNamespace

import pytest

from mamtra_ray.config import Config, SearchConfig
from mamtra_ray.distill.job import DistillJob, Report
from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.candidates import paper_candidates
from mamtra_ray.search import finalists
from mamtra_ray.search.finalists import choose_best, choose_finalists, distill_finalist, log_to_tensorboard


def row(layout: str, rung: int, ce: float, origin: str = "optuna") -> dict:
    return {"layout": layout, "rung": rung, "ce": ce, "origin": origin}


def test_papers_layouts_and_the_best_found_of_every_budget_go_on():
    rows = [
        row("AMAM", 0, 1.0, "block_beginning"),  # the paper's: in any case, and never as a found one
        row("MMAA", 0, 9.0, "back"),
        row("AAMM", 0, 1.5),
        row("AAMM", 1, 1.4),
        row("AMMA", 0, 1.1),  # lower CE, but stopped at the first rung
        row("AMMM", 0, 2.0, "probe"),
        row("MAMM", 0, 2.5),
    ]
    search = SearchConfig(ratios=("1:1", "1:3"), strategies=("block_beginning", "back"), finalists=1)
    chosen = choose_finalists(search, 4, paper_candidates(search, 4), rows)
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
        ([("a", 1.2, 0.10, 0.15), ("b", 1.1, 0.12, 0.18)], "b"),
        # b's WER is worse than a's interval: its lower CE does not help.
        ([("a", 1.2, 0.10, 0.15), ("b", 1.1, 0.30, 0.40)], "a"),
        # Nothing was heard: CE alone.
        ([("a", 1.2, None, None), ("b", 1.1, None, None)], "b"),
    ],
)
def test_wer_rules_out_and_ce_decides(rows, best):
    table = [{"layout": name, "ce": ce, "wer": wer, "wer_high": high} for name, ce, wer, high in rows]
    assert choose_best(table)["layout"] == best


def test_a_finalist_with_an_alarm_is_chosen_only_where_all_have_one():
    rows = [
        {"layout": "a", "ce": 1.0, "wer": 0.01, "wer_high": 0.02, "alarm": "does not stop"},
        {"layout": "b", "ce": 1.2, "wer": 0.10, "wer_high": 0.15, "alarm": None},
        {"layout": "c", "ce": 1.1, "wer": 0.12, "wer_high": 0.18, "alarm": None},
    ]
    assert choose_best(rows)["layout"] == "c"
    assert choose_best([{**row, "alarm": "stops at once"} for row in rows])["layout"] == "a"
    # A CE that is no number is below nothing.
    unheard = [{"layout": name, "ce": ce, "wer": None} for name, ce in (("a", math.nan), ("b", 1.2))]
    assert choose_best(unheard)["layout"] == choose_best(unheard[::-1])["layout"] == "b"


def test_a_loss_term_that_is_switched_off_is_no_obstacle(tmp_path, monkeypatch):
    """Its values are NaN, which a JSON file cannot hold; the finished result must still be read back."""
    point = {"step": 1, "tokens": 10, "total": 1.0, "ce": math.nan, "logits": 0.5, "emb": 0.5}
    trained = Report("AM", 10, 1, 1.0, 10.0, 0.0, 1.5, 0.2, 2.0, [point])
    calls = []
    monkeypatch.setattr(finalists, "distill_on_workers", lambda *_, **__: calls.append(1) or trained)
    monkeypatch.setattr(finalists, "ray", SimpleNamespace(get=lambda value: value, train=finalists.ray.train))
    records = SimpleNamespace(
        note_tokens=SimpleNamespace(remote=lambda *_: None), tokens_of=SimpleNamespace(remote=lambda *_: 0)
    )
    job = DistillJob("AM", Config(), (10,), train=None, validation=None, library=None, seed=0)
    settings = SimpleNamespace(config=Config(), records=records, job=lambda *_: job)
    results = [distill_finalist(settings, Layout("AM"), tmp_path, {"made": "so"}, lambda _: None) for _ in range(2)]
    assert [result.ce for result in results] == [1.5, 1.5] and calls == [1]
    with pytest.raises(InputError, match="other settings"):
        distill_finalist(settings, Layout("AM"), tmp_path, {"made": "otherwise"}, lambda _: None)
    log_to_tensorboard(tmp_path / "tensorboard", [point])
    assert list((tmp_path / "tensorboard").iterdir())
