"""One source for results: an evaluation of a finished run replaces all figures that report and export read."""

import dataclasses

import jiwer
import pytest
from made_run import made_run

from mamtra_ray.errors import InputError
from mamtra_ray.evaluate.__main__ import overtaken, systems_from_arguments
from mamtra_ray.evaluate.results import scored
from mamtra_ray.evaluate.run_scores import update_run
from mamtra_ray.report.report import build_report
from mamtra_ray.run.folder import read_reference, read_run, write_reference
from mamtra_ray.run.names import CONFIG, FINALISTS, REFERENCE, student_folder
from mamtra_ray.run.rows import FinalistRow, read_table, write_table

TEXTS = ["seven green cats", "my brother found nine keys", "two owls"]
RATIOS = ("1:1", "1:3")


def heard(wrong: dict[str, int], identity: str = "second"):
    """Evaluations in which ``wrong[system]`` of the three sentences lost their first word."""
    rows = {}
    for system, count in wrong.items():
        rows[system] = [
            {
                "utterance_id": f"u{index}",
                "text": text,
                "hypothesis": text.partition(" ")[2] if index < count else text,
                "failure": None,
                "stopped": True,
                "speech_tokens": [1] * 30,
                "audio_seconds": 1.5,
            }
            for index, text in enumerate(TEXTS)
        ]
    return scored(rows, "whisper_basic", identity)


@pytest.fixture
def run(tmp_path):
    return made_run(tmp_path / "run")


def test_all_figures_are_those_of_the_last_evaluation(run):
    before = read_run(run)
    exported = before.best_layout
    layouts = [row.layout for row in before.finalists]
    # The exported layout now loses words, every other one says all; nothing of the first evaluation is like that.
    wrong = {"teacher": 1, "codec": 0, **{str(layout): 0 for layout in layouts}, str(exported): 3}
    best = update_run(run, heard(wrong), RATIOS)
    after = read_run(run)
    assert best["1:1"].layout != exported and best["1:1"].wer.value == 0
    rates = {row.layout: row.wer.value for row in after.finalists}
    lost = jiwer.wer(TEXTS, [text.partition(" ")[2] for text in TEXTS])
    assert rates == {layout: pytest.approx(lost if layout == exported else 0) for layout in layouts}
    assert after.reference.teacher.wer.value == pytest.approx(1 / sum(len(text.split()) for text in TEXTS))
    assert after.reference.evaluation_sentences == 3 and after.reference.teacher_ce == before.reference.teacher_ce
    # Scores of the first evaluation that the second one did not measure are gone with it.
    assert all(row.metrics == {} and row.cer is not None for row in after.finalists)
    facts = dict((name, value) for name, value, _ in build_report([after]).facts)
    assert facts["word error rate"] == f"{100 * lost:.1f} %"
    lines = overtaken(run, best)
    assert f"holds {exported}" in lines[0] and lines[1].endswith(f"--layout {best['1:1'].layout}")


@pytest.mark.parametrize("written", [FINALISTS, REFERENCE])
def test_a_stop_between_the_two_tables_is_named_and_mended_by_evaluating_again(run, written):
    tables = {}
    for identity in ("first", "second"):
        update_run(
            run, heard({"teacher": 0, **{str(row.layout): 0 for row in read_run(run).finalists}}, identity), RATIOS
        )
        tables[identity] = read_table(run / FINALISTS, FinalistRow), read_reference(run)
    write_table(run / FINALISTS, tables["second" if written == FINALISTS else "first"][0], FinalistRow)
    write_reference(run, tables["second" if written == REFERENCE else "first"][1])
    with pytest.raises(InputError, match=f"different evaluations.*mamtra_ray.evaluate --run {run}"):
        read_run(run)
    update_run(run, heard({"teacher": 0, **{str(row.layout): 0 for row in tables["first"][0]}}), RATIOS)
    assert read_run(run).reference.evaluation == "second"


def test_before_the_search_has_ended_there_is_nothing_to_update(run):
    finalists = read_table(run / FINALISTS, FinalistRow)
    (run / FINALISTS).unlink()
    assert update_run(run, heard({"teacher": 0, **{str(row.layout): 0 for row in finalists}}), RATIOS) is None
    assert not (run / FINALISTS).exists() and (run / CONFIG).exists()


def test_other_models_are_heard_beside_the_finalists(run, tmp_path):
    layout = str(read_run(run).finalists[0].layout)
    student_folder(run, layout).mkdir(parents=True)
    other = tmp_path / "other"
    systems = systems_from_arguments([f"mine={other}"], run)
    assert systems == {layout: student_folder(run, layout), "mine": other}
    with pytest.raises(InputError, match=f"{layout} is a finalist"):
        systems_from_arguments([f"{layout}={other}"], run)
    update_run(run, heard({"teacher": 0, "mine": 2, **{str(x.layout): 0 for x in read_run(run).finalists}}), RATIOS)
    assert all(dataclasses.asdict(row.wer)["value"] == 0 for row in read_run(run).finalists)
