"""What the screen and the metrics are told while trials run, and what trainings tell of themselves."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from test_trial_table import score
from tiny_cache import LocalTeacher, tiny_config

from mamtra_ray.config import DistillConfig, StudentConfig
from mamtra_ray.distill import workers
from mamtra_ray.distill.curve import HostCopy, StepTerms
from mamtra_ray.distill.job import DistillData, DistillJob
from mamtra_ray.distill.progress import TrainingProgress, show_progress, show_progress_of_several
from mamtra_ray.distill.training import HeldOut
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.candidates import Candidate
from mamtra_ray.runtime import progress
from mamtra_ray.runtime.progress import Costs, Screen
from mamtra_ray.search import trial_phase
from mamtra_ray.search.trial_phase import _TrialsProgress
from mamtra_ray.search.trial_table import TrialTable
from mamtra_ray.search.tuning import TrialPlan


class Handle:
    """An actor's handle whose calls happen here and at once."""

    def __init__(self, actor):
        self._actor = actor

    def __getattr__(self, name):
        return SimpleNamespace(remote=getattr(self._actor, name))


class Recorded:
    """Metrics that keep what they were told."""

    def __init__(self):
        self.told = []

    def __getattr__(self, name):
        return lambda *values, **named: self.told.append((name, *values, *named.values()))


@pytest.fixture
def screen(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "repeatedly", lambda *_: contextlib.nullcontext())
    clock = SimpleNamespace(seconds=0.0)
    screen = Screen(("trials", "distill"), Costs(tmp_path / "costs.json"), lambda: clock.seconds)
    screen.test_clock = clock
    return screen


def test_trials_of_an_earlier_session_do_not_make_the_others_look_fast(tmp_path, screen, monkeypatch, capsys):
    monkeypatch.setattr(trial_phase, "result_of", lambda value: value)
    table, metrics = TrialTable(tmp_path, "s"), Recorded()
    session = SimpleNamespace(screen=screen, folder=tmp_path, costs=lambda layout: {"cache_bytes": 10.0})
    known = [Candidate(Layout(layout), "back") for layout in ("AAMM", "AMAM")]
    plan = TrialPlan([*known, Candidate(Layout("MAMA"), "probe")], num_known=2, total=6)
    told = _TrialsProgress(session, metrics, Handle(table), plan, [])

    def ended(layout, ce, **more):
        row = score(layout, 1, ce)
        table.add(row, [])
        result = {"ce": ce, "rung": 1, "layout": layout, "tokens_per_second": 50.0, **more}
        told(Layout(layout), result, False, None)
        told(Layout(layout), result, True, None)

    with screen.phase("trials", "6 layouts"):
        told.show()
        screen.test_clock.seconds += 20
        for layout in ("AAMM", "AMAM"):  # repeated from the table, in no time
            ended(layout, 1.5)
        table.note_progress("MAMA", 1200)
        table.note_progress("MMAA", 100, "measuring held-out scores")
        capsys.readouterr()
        for layout in ("MAMA", "MMAA", "AMMA"):
            screen.test_clock.seconds += 100
            ended(layout, 1.25, wer=0.25)
            screen.test_clock.seconds += 10
            told.show()
            line = capsys.readouterr().out.splitlines()[-1]
            if layout == "MAMA":
                assert "running MMAA measuring held-out scores" in line and "MAMA 1,200" not in line
        # They took 100, 110 and 110 seconds, of which the next one has had 10; the average since the start is 70.
        assert line == "    5/6 trials  1:37 left  best CE 1.250 MAMA; starting trials"
    scored = [what for what in metrics.told if what[0] == "trial_scored"]
    assert len(scored) == 5, "each result once, though the end repeats it"
    assert [result["wer"] for _, result in scored[2:]] == [0.25] * 3
    assert [what for what in metrics.told if what[0] == "trial_ended"] == [("trial_ended", False)] * 5
    assert metrics.told.count(("best_trial", 1.25, 10.0)) == 1


def test_a_training_tells_what_it_does(tmp_path, screen, monkeypatch, capsys):
    """Step by step: loading, measuring, training, measuring again, saving."""
    config = tiny_config(tmp_path)
    from mamtra_ray.teachers import load_teacher

    teacher = load_teacher(config.teacher.kind, config.teacher.path)
    cache = SimpleNamespace(
        manifest=SimpleNamespace(made_by={"corpus": "c", "format": {}, "selection": {}}), speech_tokens=10
    )
    actor, seen = TrainingProgress(), []

    def note(layout, tokens, doing=""):
        seen.append((tokens, doing))
        actor.note_progress(layout, tokens, doing)

    handle = SimpleNamespace(
        note_progress=SimpleNamespace(remote=note),
        running=Handle(actor).running,
        say=Handle(actor).say,
        new_sentences=Handle(actor).new_sentences,
    )
    job = DistillJob(
        Layout("AMAM"),
        DistillConfig(tokens=30, tokens_per_batch=10, learning_rate=1e-3),
        StudentConfig(initialization="transfer"),
        DistillData(LocalTeacher(teacher), cache, cache, None),
        report_at=(20, 30),
        progress=handle,
    )
    monkeypatch.setattr("mamtra_ray.distill.training.Distillation.validate", lambda *_: HeldOut(1.0, 0.5, 10))
    monkeypatch.setattr(workers, "batches", lambda *_, **__: iter([SimpleNamespace(num_tokens=10)] * 3))

    def step(training, batch):
        training.position = training.position.after(batch.num_tokens)
        return StepTerms(training.position.step, training.position.tokens, 1e-3, HostCopy(torch.ones(5)))

    monkeypatch.setattr("mamtra_ray.distill.training.Distillation.step", step)
    monkeypatch.setattr("mamtra_ray.distill.training.Stopwatch.a_second_passed", lambda _: True)
    monkeypatch.setattr("mamtra_ray.distill.progress.result_of", lambda value: value)
    with screen.phase("distill", "AMAM"):
        screen.test_clock.seconds += 10
        show_progress(screen, job)  # before it has told anything
        for _ in workers.distill(job, torch.device("cpu")):
            screen.test_clock.seconds += 10
            show_progress(screen, job)
    assert seen == [
        (0, "loading the teacher and its student"),
        (0, "measuring held-out scores before the first step"),
        (0, ""),
        (10, ""),
        (20, ""),
        (20, "measuring held-out scores"),
        (20, "saving"),
        (20, ""),
        (30, ""),
        (30, "measuring held-out scores"),
        (30, "saving"),
        (30, ""),
    ]
    shown = capsys.readouterr().out.splitlines()
    assert any("starting workers" in line for line in shown) and any("AMAM  saving" in line for line in shown), shown
    with screen.phase("distill", "AMAM"):
        show_progress(screen, job)
    assert "    30/30 tokens" in capsys.readouterr().out.splitlines()


def test_trainings_side_by_side_are_counted_together(screen, monkeypatch, capsys):
    actor = TrainingProgress()
    handle = SimpleNamespace(running=Handle(actor).running, new_sentences=Handle(actor).new_sentences)
    monkeypatch.setattr("mamtra_ray.distill.progress.result_of", lambda value: value)
    shown = {"layouts": ["AMAM", "AAMM", "MMAA", "MAMA"], "tokens": 100}
    actor.note_progress("AMAM", 100, "saving")  # its end has not been told yet
    actor.note_progress("AAMM", 40)
    actor.note_progress("MMAA", 0, "loading the teacher and its student")
    actor.note_progress("AMMA", 70)  # of no concern here
    with screen.phase("distill", "four"):
        screen.test_clock.seconds += 10
        show_progress_of_several(screen, handle, finished={"AMAM"}, **shown)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "tokens" in line]
    assert line.startswith("    140/400 tokens") and "AAMM and MMAA" in line
