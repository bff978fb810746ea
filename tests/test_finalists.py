"""Who is distilled longer, and who of them is exported."""

import pytest

from mamtra_ray.candidates import paper_candidates
from mamtra_ray.config import SearchConfig
from mamtra_ray.finalists import choose_best, choose_finalists


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
    search = SearchConfig(ratios=("1:1", "1:3"), finalists=1)
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
