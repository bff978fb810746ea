"""A node runs out of memory: Ray ends processes, Tune ends with them, and the search goes on with fewer at a time."""

from types import SimpleNamespace

import pytest
import ray.exceptions
from ray import tune
from test_errors import ending_with
from test_finalists import row
from test_trial_progress import Handle, Recorded, screen  # noqa: F401 (a fixture)

from mamtra_ray.config import SearchConfig
from mamtra_ray.errors import InputError, explain_also
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.candidates import Candidate, SearchSpace
from mamtra_ray.runtime.cluster import lost_by_ray
from mamtra_ray.runtime.resources import WorkerResources
from mamtra_ray.search import trial_phase, tuning
from mamtra_ray.search.trial_table import TrialTable
from mamtra_ray.search.tuning import NodeOutOfMemoryError

KILLED = ray.exceptions.OutOfMemoryError(
    "4 worker(s) were killed due to the node running low on memory. Memory on the node was 22.37GB used / 23.54GB\n"
    "OOM kill reason: Memory usage 24056647680B exceeded threshold\nObject store memory usage: ..."
)


def as_tune_raises_it() -> RuntimeError:
    error = RuntimeError(f"Caught unexpected exception: {KILLED}")
    error.__cause__ = KILLED
    return error


@pytest.mark.parametrize("error", [KILLED, as_tune_raises_it()], ids=["by itself", "inside of another"])
def test_it_is_one_sentence_in_every_verb(error, capsys):
    explain_also(lost_by_ray)
    assert ending_with(error) == 2
    found = capsys.readouterr()
    assert found.out == "" and found.err.count("\n") == 1
    assert "a node ran out of memory" in found.err and "22.37GB used / 23.54GB" in found.err
    assert found.err.endswith("goes on where it stopped\n")


def test_tunes_own_errors_keep_their_traceback(tmp_path, monkeypatch):
    settings = SimpleNamespace(search=SearchConfig(), worker=WorkerResources(), space=SearchSpace(4, ("1:1",)))
    monkeypatch.setattr(tuning, "_proposals", lambda *_: None)
    monkeypatch.setattr(tune, "with_parameters", lambda *_, **__: lambda _: None)
    plan = tuning.TrialPlan([], 0, 1)
    for error, raised in ((as_tune_raises_it(), NodeOutOfMemoryError), (RuntimeError("a mistake"), RuntimeError)):
        monkeypatch.setattr(tune.Tuner, "fit", lambda self, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(raised):
            tuning.run_trials(settings, plan, tmp_path, print, at_once=1)


class World:
    """A search of four layouts whose first sessions of Tune run out of memory, each after one more trial."""

    def __init__(self, tmp_path, screen, monkeypatch, failing):  # noqa: F811
        self.table, self.calls, self.failing = TrialTable(tmp_path, "s"), [], failing
        self.left = ["AAMM", "AMAM", "MAMA", "MMAA"]
        self.settings = SimpleNamespace(
            table=Handle(self.table), search=SearchConfig(trials=4), worker=WorkerResources(), speech=None
        )
        monkeypatch.setattr(trial_phase, "replace", lambda settings, **_: settings)
        monkeypatch.setattr(trial_phase, "result_of", lambda value: value)
        monkeypatch.setattr(trial_phase, "run_trials", self.run_trials)
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
        space = SearchSpace(4, ("1:1",))
        config = SimpleNamespace(search=SearchConfig(trials=4))
        self.session = SimpleNamespace(
            screen=screen, folder=tmp_path, space=space, config=config, costs=lambda _: {"cache_bytes": 1.0}
        )

    def run_trials(self, settings, plan, folder, on_result, at_once):
        self.calls.append((at_once, [str(one.layout) for one in plan.candidates[: plan.num_known]]))
        for _ in range(1 if len(self.calls) <= self.failing else len(self.left)):
            self.table.add(row(self.left.pop(0), 1, 1.5), [])
        if len(self.calls) <= self.failing:
            raise NodeOutOfMemoryError(str(KILLED))

    def search(self):
        starting_points = [Candidate(Layout(layout), "back") for layout in self.left]
        return trial_phase.run_the_trials(self.session, self.settings, starting_points, [], Recorded())


def test_the_trials_go_on_half_as_many_at_a_time(tmp_path, screen, monkeypatch, capsys):  # noqa: F811
    world = World(tmp_path, screen, monkeypatch, failing=2)
    rows, failures = world.search()
    assert world.calls == [(4, []), (2, ["AAMM"]), (1, ["AAMM", "AMAM"])], "what was scored is not tried again"
    assert [str(one.layout) for one in rows] == ["AAMM", "AMAM", "MAMA", "MMAA"] and failures == []
    said = capsys.readouterr().out
    assert "they go on, 2 at a time from now on" in said and "they go on, 1 at a time from now on" in said


def test_one_trial_that_does_not_fit_ends_the_search_with_a_sentence(tmp_path, screen, monkeypatch):  # noqa: F811
    world = World(tmp_path, screen, monkeypatch, failing=3)
    with pytest.raises(InputError, match=r"with one trial at a time.*22\.37GB used / 23\.54GB.*goes on$"):
        world.search()
    assert len(world.calls) == 3 and len(world.table.all_rows()) == 3, "nothing computed is lost"
