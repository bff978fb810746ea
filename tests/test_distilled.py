"""The student of ``distill`` is heard, and exported, like a finalist."""

import json
from types import SimpleNamespace

import pytest
import torch
from made_run import finalist_row
from test_run_scores import heard
from tiny_cache import tiny_config
from transformers import AutoModelForCausalLM

from mamtra_ray.config import save_config
from mamtra_ray.distill.__main__ import what_next
from mamtra_ray.errors import InputError
from mamtra_ray.evaluate.__main__ import systems_from_arguments
from mamtra_ray.evaluate.run_scores import update_distilled
from mamtra_ray.export.__main__ import main as export
from mamtra_ray.run.distilled import distilled_row, distilled_system, read_distilled, write_distilled
from mamtra_ray.run.folder import read_run
from mamtra_ray.run.names import CONFIG, FINALISTS, distilled_student, student_folder
from mamtra_ray.run.rows import FinalistRow, write_table
from mamtra_ray.speak.models import found
from mamtra_ray.speech_lm.speech_lm import SpeechLM
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.teachers import load_teacher

REPORT = SimpleNamespace(tokens=1234, step=7, seconds=2.0, ce=1.5, kl=0.5, ce_start=2.5, kl_start=1.5)
COSTS = {"cache_bytes": 100.0, "decode_flops": 200.0, "parameters": 300.0}


@pytest.fixture
def run(tmp_path):
    """A run of ``distill`` with layout AMMA, as it leaves it."""
    config = tiny_config(tmp_path)
    folder = tmp_path / "runs" / "mine"
    save_config(config, folder / CONFIG)
    teacher = load_teacher(config.teacher.kind, config.teacher.path)
    student = make_student(teacher.model, "AMMA")
    student.save(distilled_student(folder))
    write_distilled(folder, distilled_row(student.layout, REPORT, COSTS))
    return folder


def test_it_is_heard_without_being_named(run, tmp_path):
    assert systems_from_arguments([], run) == {"AMMA": distilled_student(run)}
    other = tmp_path / "other"
    assert systems_from_arguments([f"mine={other}"], run) == {"AMMA": distilled_student(run), "mine": other}
    with pytest.raises(InputError, match="AMMA is the student of"):
        systems_from_arguments([f"AMMA={other}"], run)
    assert found(run).folder == distilled_student(run)
    # Beside a finalist of the same layout it has another name.
    make_student(SpeechLM.load(distilled_student(run)), "AMMA", "transfer").save(student_folder(run, "AMMA"))
    assert systems_from_arguments([], run) == {
        "AMMA": student_folder(run, "AMMA"),
        "distilled AMMA": distilled_student(run),
    }


def test_what_is_heard_goes_into_its_row(run):
    before = read_distilled(run)
    assert before.wer is None and (before.ce, before.tokens, before.steps) == (1.5, 1234, 7)
    assert update_distilled(run, heard({"teacher": 0, "other": 1})) is None and read_distilled(run) == before
    evaluations = heard({"teacher": 0, "AMMA": 3})
    update_distilled(run, evaluations)
    row = read_distilled(run)
    assert row.wer == evaluations["AMMA"].wer and row.wer.value > 0 and row.evaluation == "second"
    assert row.wer_difference.value == row.wer.value and row.alarm is None
    # What does not end is an alarm here too.
    for one in evaluations["AMMA"].rows:
        one["stopped"] = False
    update_distilled(run, evaluations)
    assert "does not stop by itself in 100 %" in read_distilled(run).alarm


def test_it_is_exported_as_a_finalist_is(run, capsys):
    update_distilled(run, heard({"teacher": 0, "AMMA": 3}))
    assert export(["--run", str(run)]) == 0
    folder = run / "export" / "AMMA"
    assert capsys.readouterr().out.strip() == str(folder)
    student, ids = SpeechLM.load(distilled_student(run)).eval(), torch.tensor([[71, 5, 72, 73, 40]])
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    vocabulary = student.vocabulary
    with torch.no_grad():
        theirs = plain(ids).logits[..., vocabulary.speech_offset : vocabulary.control_offset]
        assert torch.allclose(theirs, student(ids), atol=1e-4)
    scores = json.loads((folder / "layout.json").read_text())["scores"]
    assert scores["ce"] == 1.5 and scores["wer"] == read_distilled(run).wer.value
    card = (folder / "README.md").read_text()
    assert 'python -m mamtra_ray.speak --student PATH --run RUN --output speech.wav "YOUR TEXT"' in card
    assert export(["--run", str(run), "--layout", "AMMA", "--format", "native", "--output", str(run / "own")]) == 0
    assert SpeechLM.load(run / "own").layout == student.layout


def test_what_cannot_be_exported_is_said(run, capsys):
    assert export(["--run", str(run), "--layout", "MAAM"]) == 2
    assert "MAAM is no finalist" in capsys.readouterr().err
    (run / "distilled.parquet").unlink()
    assert export(["--run", str(run)]) == 2
    assert f"python -m mamtra_ray.distill --run {run} --layout AMMA" in capsys.readouterr().err
    (distilled_student(run) / "config.json").unlink()
    write_table(run / FINALISTS, [finalist_row("MMAA")], FinalistRow)
    assert export(["--run", str(run)]) == 2
    assert "give --layout (finalists: MMAA)" in capsys.readouterr().err


def test_scores_of_another_layout_do_not_count(run):
    make_student(load_teacher("huggingface", read_run(run).config.teacher.path).model, "MAAM").save(
        distilled_student(run)
    )
    assert read_distilled(run) is None and distilled_system(run) == "MAAM"


def test_the_last_lines_of_distill_are_commands_that_verbs_understand(run):
    lines = what_next(run, speaks=True)
    verbs = [line.partition("mamtra_ray.")[2].partition(" ")[0] for line in lines if line]
    assert verbs == ["speak", "evaluate", "compare", "export"]
    assert [line for line in what_next(run, speaks=False) if line] == [lines[-1]]
    import shlex

    arguments = shlex.split(lines[-1].partition("mamtra_ray.export ")[2])
    assert export(arguments) == 0
