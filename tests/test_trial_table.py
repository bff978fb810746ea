"""The trials table: on disk at once, reused only under the same settings, whatever was cut off."""

import pytest

from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.run.folder import read_trials
from mamtra_ray.run.journal import CURVE_KEY, Journal, read_journal
from mamtra_ray.run.names import CURVES, TRIALS
from mamtra_ray.run.rows import CurvePoint, TrialRow, read_table
from mamtra_ray.search.trial_table import TrialTable

STEP = {"step": 1, "tokens": 10, "total": 1.0, "ce": 1.0, "kl": 0.0, "hidden": float("nan")}


def score(layout: str, rung: int, ce: float = 1.0, origin: str = "optuna") -> TrialRow:
    kept = layout.count("A")
    return TrialRow(
        layout=Layout(layout),
        trial_id="t",
        origin=origin,
        rung=rung,
        tokens=100 * (rung + 1),
        seconds=1.0,
        tokens_per_second=100.0,
        data_wait_fraction=0.0,
        ce=ce,
        kl=0.1,
        ce_start=2.0,
        kl_start=1.0,
        cache_bytes=10.0 * kept,
        decode_flops=1.0 * kept,
        parameters=100.0 + kept,
        status="running",
        settings_hash="",
    )


def test_rows_survive_the_process_and_carry_origin_and_costs(tmp_path):
    first = TrialTable(tmp_path, "s")
    first.add(score("AMAM", 0, origin="block_beginning"), [STEP])
    first.add(score("AMMM", 0, 2.0), [STEP])
    first.finish(Layout("AMMM"))
    assert {row.layout: row.status for row in read_trials(tmp_path)} == {
        Layout("AMAM"): "running",
        Layout("AMMM"): "finished",
    }, "a reader sees the rows while the search runs"
    second = TrialTable(tmp_path, "s")  # the first was killed: nothing closed it
    assert [row.rung for row in second.rows_of(Layout("AMAM"))] == [0]
    assert second.is_finished(Layout("AMMM")) and not second.is_finished(Layout("AMAM"))
    by_layout = {str(row.layout): row for row in read_table(tmp_path / TRIALS, TrialRow)}
    assert by_layout["AMAM"].origin == "block_beginning" and by_layout["AMMM"].origin == "optuna"
    assert by_layout["AMMM"].cache_bytes == 10 and by_layout["AMAM"].parameters == 102
    assert len(second.curve_of("t", Layout("AMAM"))) == 1


def test_other_settings_do_not_reuse_and_do_not_lose_rows(tmp_path):
    TrialTable(tmp_path, "old").add(score("AMAM", 0), [])
    new = TrialTable(tmp_path, "new")
    assert new.rows_of(Layout("AMAM")) == [] and new.all_rows() == []
    new.add(score("AMAM", 0, 3.0), [])
    assert len(read_trials(tmp_path)) == 2


def test_a_gap_ends_what_is_known(tmp_path):
    table = TrialTable(tmp_path, "s")
    table.add(score("AMAM", 1), [])
    assert table.rows_of(Layout("AMAM")) == []
    table.add(score("AMAM", 0), [])
    assert [row.rung for row in table.rows_of(Layout("AMAM"))] == [0, 1]


def test_a_damaged_table_is_one_sentence(tmp_path):
    (tmp_path / TRIALS).write_bytes(b"no parquet")
    with pytest.raises(InputError, match=r"trials\.parquet is damaged"):
        TrialTable(tmp_path, "s")


def test_a_journal_cut_off_anywhere_keeps_every_row_that_was_acknowledged(tmp_path):
    rows = [CurvePoint(layout=Layout("AM"), trial_id="t", rung=0, **{**STEP, "step": step}) for step in range(4)]
    table = tmp_path / "whole" / CURVES
    table.parent.mkdir()
    journal = Journal(table, CurvePoint, CURVE_KEY)
    journal.append(rows[:2])
    journal.append(rows[2:])
    content = table.with_suffix(".jsonl").read_bytes()
    lines = content.count(b"\n")
    assert lines == 4
    for cut in range(len(content)):
        path = tmp_path / f"cut-{cut}" / CURVES
        path.parent.mkdir()
        path.with_suffix(".jsonl").write_bytes(content[:cut])
        found = read_journal(path, CurvePoint, CURVE_KEY)
        assert [row.step for row in found] == list(range(content[:cut].count(b"\n")))


def test_a_crash_between_the_two_files_repeats_no_row(tmp_path):
    """Compacting writes the Parquet file, then removes the journal: killed in between, both hold the same rows."""
    journal = Journal(tmp_path / CURVES, CurvePoint, CURVE_KEY)
    journal.append([CurvePoint(layout=Layout("AM"), trial_id="t", rung=0, **STEP)])
    content = (tmp_path / CURVES).with_suffix(".jsonl").read_bytes()
    journal.compact()
    (tmp_path / CURVES).with_suffix(".jsonl").write_bytes(content)
    assert len(Journal(tmp_path / CURVES, CurvePoint, CURVE_KEY).rows) == 1


def test_a_journal_with_a_damaged_line_is_named(tmp_path):
    path = tmp_path / CURVES
    path.with_suffix(".jsonl").write_text("{no json}\n")
    with pytest.raises(InputError, match=r"curves\.jsonl, line 1, is damaged"):
        read_journal(path, CurvePoint, CURVE_KEY)
