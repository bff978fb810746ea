"""What TensorBoard shows of trials and finalists, read back from the event files."""

import struct
from dataclasses import dataclass
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event
from test_trial_table import STEP, score
from tiny_search import write_search_space

from mamtra_ray.distill.__main__ import main as distill
from mamtra_ray.distill.curves import TensorBoardCurves
from mamtra_ray.distill.job import Report
from mamtra_ray.layouts import Layout
from mamtra_ray.run.distilled import read_distilled
from mamtra_ray.run.names import CURVES
from mamtra_ray.run.rows import CurvePoint, TableRow, read_table, write_table
from mamtra_ray.search.trial_table import TrialTable
from mamtra_ray.speech.error_rate import ErrorRate


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(tokens, value) by name, of all event files of a folder."""
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content = path.read_bytes()
        while content:  # TFRecord: length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            content = content[12 + length + 4 :]
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return {name: sorted(values) for name, values in found.items()}


def with_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The same by TensorBoard's own reader."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: sorted((e.step, e.value) for e in events.Scalars(tag)) for tag in events.Tags()["scalars"]}


def steps(first, count):
    return [
        {**STEP, "step": n, "tokens": 10 * n, "ce": 1.0 / n, "learning_rate": 2.0**-n, "grad_norm": 0.5 * n}
        for n in range(first, first + count)
    ]


@pytest.fixture
def run(tmp_path):
    table = TrialTable(tmp_path, "s")
    table.add(score("AMAM", 0, ce=1.5), steps(1, 3))
    heard = {"wer": ErrorRate(0.25, 0.125, 0.5), "token_error_rate": 0.75}
    last = score("AMAM", 1, ce=1.25)
    table.add(last.__class__(**{**vars(last), **heard}), steps(4, 2))
    report = {"seconds": 1.0, "data_wait_fraction": 0.0, "ce_start": 3.0, "kl_start": 2.0, "layout": "AMMM"}
    first = Report(tokens=20, step=2, ce=2.5, kl=1.5, tokens_per_second=40.0, curve=steps(1, 2), **report)
    table.add_finalist_report(Layout("AMMM"), 2, first)
    # Another session, whose table knows nothing of the first one's files.
    again = Report(tokens=40, step=4, ce=2.25, kl=1.25, tokens_per_second=80.0, curve=steps(3, 2), **report)
    TrialTable(tmp_path, "s").add_finalist_report(Layout("AMMM"), 2, again)
    return tmp_path


@pytest.mark.parametrize("read", [scalars, with_tensorboard])
def test_trials_and_finalists_show_scores_losses_rate_norm_and_speed(run, read):
    trial = read(run / "tensorboard" / "trials" / "AMAM")
    assert trial["held_out/ce"] == [(0, 2.0), (100, 1.5), (200, 1.25)]
    assert trial["held_out/kl"] == [(0, 1.0), (100, pytest.approx(0.1)), (200, pytest.approx(0.1))]
    assert trial["loss/ce"] == [(10 * n, pytest.approx(1 / n)) for n in range(1, 6)]
    assert trial["optimizer/learning_rate"] == [(10 * n, 2.0**-n) for n in range(1, 6)]
    assert trial["optimizer/gradient_norm"] == [(10 * n, 0.5 * n) for n in range(1, 6)]
    assert trial["speed/tokens_per_second"] == [(100, 100.0), (200, 100.0)]
    assert trial["speech/wer"] == [(200, 0.25)] and trial["speech/token_error_rate"] == [(200, 0.75)]
    assert "loss/hidden" not in trial, "a term that is switched off is NaN"
    finalist = read(run / "tensorboard" / "finalists" / "AMMM")
    assert finalist["held_out/ce"] == [(0, 3.0), (20, 2.5), (40, 2.25)], "both sessions, the start once"
    assert finalist["speed/tokens_per_second"] == [(20, 40.0), (40, 80.0)]
    assert [tokens for tokens, _ in finalist["loss/total"]] == [10, 20, 30, 40]
    assert "speech/wer" not in finalist


def test_the_student_of_distill_shows_what_a_finalist_does(run, tmp_path):
    callback = TensorBoardCurves(tmp_path / "mine", Layout("AMMM"))
    for tokens, ce, first in ((20, 2.5, 1), (40, 2.25, 3)):
        report = Report(
            layout="AMMM", tokens=tokens, step=tokens // 10, seconds=1.0, tokens_per_second=2.0 * tokens,
            data_wait_fraction=0.0, ce=ce, kl=ce - 1, ce_start=3.0, kl_start=2.0, curve=steps(first, 2),
        )  # fmt: skip
        callback.after_report(None, [vars(report), {**vars(report), "ce": 99.0}], None)
    finalist = scalars(run / "tensorboard" / "finalists" / "AMMM")
    assert scalars(tmp_path / "mine" / "tensorboard" / "distilled" / "AMMM") == finalist


@pytest.mark.slow
def test_distill_leaves_its_curves(tmp_path):
    space, folder = write_search_space(tmp_path), tmp_path / "runs" / "mine"
    assert distill(["--space", str(space), "--run", str(folder), "--layout", "AMMM"]) == 0
    found, row = scalars(folder / "tensorboard" / "distilled" / "AMMM"), read_distilled(folder)
    held_out = found["held_out/ce"]
    assert held_out[0][0] == 0 and len(held_out) == 3, "the start and both checkpoints"
    assert held_out[0][1] == pytest.approx(row.ce_start) and held_out[-1] == (row.tokens, pytest.approx(row.ce))
    assert len(found["loss/total"]) == row.steps == len(found["optimizer/learning_rate"])


def test_curves_keep_rate_and_norm_and_those_of_earlier_versions_are_read(run, tmp_path):
    table = TrialTable(run, "s")
    table.compact()
    points = [point for point in read_table(run / CURVES, CurvePoint) if point.trial_id == "t"]
    assert [(point.learning_rate, point.grad_norm) for point in points] == [(2.0**-n, 0.5 * n) for n in range(1, 6)]

    @dataclass(frozen=True)
    class OldPoint(TableRow):
        trial_id: str
        rung: int
        step: int
        tokens: int
        total: float
        ce: float
        kl: float
        hidden: float

    write_table(tmp_path / "old.parquet", [OldPoint(Layout("AM"), "t", 0, 1, 10, 3.0, 2.0, 1.0, 0.5)], OldPoint)
    assert read_table(tmp_path / "old.parquet", CurvePoint) == [
        CurvePoint(Layout("AM"), "t", 0, 1, 10, 3.0, 2.0, 1.0, 0.5)
    ]
