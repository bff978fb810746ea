"""The trials table: on disk at once, reused only under the same settings."""

import pytest

from mamtra_ray.errors import InputError
from mamtra_ray.run.folder import TRIAL_COLUMNS, read_rows
from mamtra_ray.run.names import TRIALS
from mamtra_ray.search.trial_table import TrialRecords

COSTS = {kept: {"cache_bytes": 10 * kept, "decode_flops": kept, "parameters": 100 + kept} for kept in range(5)}


def records(folder, settings_hash="s"):
    return TrialRecords(folder, settings_hash, {"AMAM": "block_beginning"}, COSTS)


def score(layout: str, rung: int, ce: float = 1.0) -> dict:
    return {
        "layout": layout,
        "ratio": "1:1",
        "rung": rung,
        "tokens": 100 * (rung + 1),
        "seconds": 1.0,
        "ce": ce,
        "kl": 0.1,
        "ce_start": 2.0,
        "trial_id": "t",
    }


STEP = {"step": 1, "tokens": 10, "total": 1.0, "ce": 1.0, "logits": 0.0, "emb": 0.0}


def test_rows_survive_the_process_and_carry_origin_and_costs(tmp_path):
    first = records(tmp_path)
    first.add(score("AMAM", 0), [STEP])
    first.add(score("AMMM", 0, 2.0), [STEP])
    first.finish("AMMM")
    second = records(tmp_path)
    assert [row["rung"] for row in second.rows_of("AMAM")] == [0]
    assert second.is_finished("AMMM") and not second.is_finished("AMAM")
    by_layout = {row["layout"]: row for row in read_rows(tmp_path / TRIALS, TRIAL_COLUMNS)}
    assert by_layout["AMAM"]["origin"] == "block_beginning" and by_layout["AMMM"]["origin"] == "optuna"
    assert by_layout["AMMM"]["cache_bytes"] == 10 and by_layout["AMAM"]["parameters"] == 102


def test_other_settings_do_not_reuse_and_do_not_lose_rows(tmp_path):
    records(tmp_path, "old").add(score("AMAM", 0), [])
    new = records(tmp_path, "new")
    assert new.rows_of("AMAM") == [] and new.all_rows() == []
    new.add(score("AMAM", 0, 3.0), [])
    assert len(read_rows(tmp_path / TRIALS, TRIAL_COLUMNS)) == 2


def test_a_gap_ends_what_is_known(tmp_path):
    table = records(tmp_path)
    table.add(score("AMAM", 1), [])
    assert table.rows_of("AMAM") == []
    table.add(score("AMAM", 0), [])
    assert [row["rung"] for row in table.rows_of("AMAM")] == [0, 1]


def test_a_damaged_table_is_one_sentence(tmp_path):
    (tmp_path / TRIALS).write_bytes(b"no parquet")
    with pytest.raises(InputError, match=r"trials\.parquet is damaged"):
        records(tmp_path)
