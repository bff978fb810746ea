"""A trial that is killed anywhere goes on bit for bit; what fails in it is said in one line."""

import errno
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import ray
from test_trial_table import score
from tiny_cache import LocalTeacher, cache_without_ray, tiny_config

from mamtra_ray.config import DistillConfig, SearchConfig, StudentConfig
from mamtra_ray.corpus.table import corpus_identity, read_corpus
from mamtra_ray.distill import training as distill_training
from mamtra_ray.distill.job import DistillData
from mamtra_ray.distill.training import Distillation
from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.candidates import SearchSpace
from mamtra_ray.run.folder import read_trials
from mamtra_ray.runtime.actor_pool import result_of
from mamtra_ray.runtime.resources import WorkerResources
from mamtra_ray.search import trial, trial_phase
from mamtra_ray.search.trial import TrialSettings, run_trial
from mamtra_ray.search.trial_table import TrialTable
from mamtra_ray.teacher_cache.shared import share_cache
from mamtra_ray.teachers import load_teacher

LAYOUT = Layout("AMAM")
COSTS = {"cache_bytes": 1.0, "decode_flops": 1.0, "parameters": 1.0}


class KilledError(BaseException):
    """Stands for the end of the process: nothing of ours catches it."""


@pytest.fixture(scope="module")
def data(tmp_path_factory, ray_cluster):
    folder = tmp_path_factory.mktemp("trial")
    config = tiny_config(folder)
    cache_without_ray(config, folder / "cache")
    teacher = load_teacher(config.teacher.kind, config.teacher.path)
    corpus_hash = corpus_identity(read_corpus(config.corpus.path)).corpus_hash
    train, validation = (
        share_cache(folder / "cache", teacher_fingerprint=teacher.fingerprint, corpus_hash=corpus_hash, split=split)
        for split in ("train", "validation")
    )
    return DistillData(LocalTeacher(teacher), train, validation, None)


class Trial:
    """One layout's trials in a run folder; the table is the actor of a real search."""

    def __init__(self, data, folder, monkeypatch):
        self.folder, self.reports, self.steps = folder, [], 0
        context = SimpleNamespace(get_trial_id=lambda: "t")
        monkeypatch.setattr(trial, "tune", SimpleNamespace(report=self.reports.append, get_context=lambda: context))
        monkeypatch.setattr(trial_phase, "settings_hash", lambda *_: "s")
        self.table = trial_phase.start_trial_table(SimpleNamespace(folder=folder), data)
        self.settings = TrialSettings(
            space=SearchSpace(4, ("1:1",)),
            search=SearchConfig(ratios=("1:1",), rung_tokens=(300, 600, 900)),
            settings=DistillConfig(tokens=900, tokens_per_batch=100, learning_rate=1e-3, schedule="cosine"),
            student=StudentConfig(initialization="transfer"),
            data=data,
            worker=WorkerResources(),
            seed=0,
            costs=dict.fromkeys(range(5), COSTS),
            states=folder / "trial_states",
            table=self.table,
        )
        step = Distillation.step

        def counted(training, batch):
            self.steps += 1
            return step(training, batch)

        monkeypatch.setattr(Distillation, "step", counted)

    def run(self, **changes):
        run_trial({"layout": str(LAYOUT)}, replace(self.settings, **changes))

    def rows(self):
        return [
            (row.rung, row.tokens, row.ce, row.kl, row.ce_start) for row in result_of(self.table.rows_of.remote(LAYOUT))
        ]


@pytest.fixture
def make_trial(data, tmp_path, monkeypatch):
    return lambda name: Trial(data, tmp_path / name, monkeypatch)


class KilledAt:
    """The table's handle in a trial whose process ends before its row of a rung arrives."""

    def __init__(self, table, rung):
        self.table, self.rung = table, rung
        self.add = SimpleNamespace(remote=self._add)

    def __getattr__(self, name):
        return getattr(self.table, name)

    def _add(self, row, curve):
        if row.rung == self.rung:
            raise KilledError
        return self.table.add.remote(row, curve)


@pytest.mark.parametrize("rung", [0, 1, 2])
def test_killed_between_the_training_state_and_the_row(make_trial, rung):
    whole, killed = make_trial("whole"), make_trial("killed")
    whole.run()
    assert [row[0] for row in whole.rows()] == [0, 1, 2]
    whole_steps, killed.steps = whole.steps, 0  # both have counted them
    with pytest.raises(KilledError):
        killed.run(table=KilledAt(killed.table, rung))
    assert killed.rows() == whole.rows()[:rung]
    killed.run()
    assert killed.rows() == whole.rows()
    assert killed.steps == whole_steps, "no step was done twice"
    curves = [result_of(one.table.curve_of.remote("t", LAYOUT)) for one in (whole, killed)]
    assert curves[0] == curves[1]


@pytest.mark.parametrize("moment", ["before its position", "before its tensors"])
def test_killed_while_the_training_state_is_written(make_trial, monkeypatch, moment):
    """The student's weights are another file than the optimizer's: half of each would be a training of its own."""
    whole, killed = make_trial("whole"), make_trial("killed")
    whole.run()

    def die(*_, **__):
        raise KilledError

    def die_at_the_second_rung(folder, state, position, *rest, **content):
        if position.tokens >= 600:
            if moment == "before its position":
                patched.setattr("mamtra_ray.runtime.training.write_manifest", die)
            else:
                die()
        save(folder, state, position, *rest, **content)

    save = distill_training.save_state
    with monkeypatch.context() as patched:
        patched.setattr(distill_training, "save_state", die_at_the_second_rung)
        with pytest.raises(KilledError):
            killed.run()
    assert [row[0] for row in killed.rows()] == [0]
    killed.run()
    assert killed.rows() == whole.rows()


def test_the_table_survives_the_death_of_its_process(make_trial):
    one = make_trial("table")
    one.run()
    before = one.rows()
    ray.kill(one.table, no_restart=False)
    assert one.rows() == before
    result_of(one.table.add.remote(score("AAMM", 0), []))
    ray.kill(one.table, no_restart=False)
    result_of(one.table.finish.remote(LAYOUT))
    statuses = {str(row.layout): row.status for row in read_trials(one.folder)}
    assert statuses == {"AMAM": "finished", "AAMM": "running"}


def test_a_state_of_another_training_is_not_gone_on_with(make_trial):
    one = make_trial("changed")
    with pytest.raises(KilledError):
        one.run(table=KilledAt(one.table, 0))
    other = one.settings.settings.model_copy(update={"learning_rate": 2e-3})
    fresh = make_trial("fresh")
    fresh.run(settings=other)
    one.run(settings=other)
    assert one.rows() == fresh.rows()


@pytest.mark.parametrize(
    ("error", "reason", "is_disk_full"),
    [
        (FloatingPointError("the gradient norm is nan"), "FloatingPointError: the gradient norm is nan", False),
        (InputError("library is damaged"), "library is damaged", False),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "no space left to write", True),
    ],
)
def test_what_fails_is_noted_in_one_line_with_its_traceback(make_trial, monkeypatch, error, reason, is_disk_full):
    one = make_trial("failing")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("mamtra_ray.runtime.training.torch.save", fail)
    one.run()
    failure = result_of(one.table.failure_of.remote(LAYOUT))
    assert failure.reason.startswith(reason) and failure.is_disk_full == is_disk_full
    assert failure.traceback.read_text().startswith("Traceback")
    assert one.rows() == [] and one.reports == []


def test_a_row_that_does_not_fit_on_the_disk_is_said_and_leaves_no_half_line(tmp_path, ray_cluster):
    """In a process of its own, whose files may not grow; the same error as of a full disk, but for its number."""

    @ray.remote(num_cpus=0)
    class Limited(TrialTable):
        def limit(self, num_bytes):
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))

    table = Limited.remote(tmp_path, "s")
    ray.get(table.add.remote(score("AMAM", 0), []))
    size = (tmp_path / "trials.jsonl").stat().st_size
    ray.get(table.limit.remote(size + 10))
    with pytest.raises(InputError, match=r"no space left to write .*trials\.jsonl"):
        result_of(table.add.remote(score("AMAM", 1), []))
    assert (tmp_path / "trials.jsonl").stat().st_size == size
    ray.get(table.limit.remote(size * 4))
    result_of(table.add.remote(score("AMAM", 1), []))
    assert [row.rung for row in read_trials(tmp_path)] == [0, 1]
