"""Which settings a verb runs with, in which folder, and what it refuses to change."""

import multiprocessing

import pytest

from mamtra_ray.config import load_config, save_config
from mamtra_ray.distill.__main__ import main as distill
from mamtra_ray.errors import InputError
from mamtra_ray.evaluate.__main__ import main as evaluate
from mamtra_ray.run.identity import check_identity
from mamtra_ray.run.names import CONFIG, TRIALS
from mamtra_ray.run.open_run import open_run
from mamtra_ray.run.session import lock_run
from mamtra_ray.search.__main__ import main as search


@pytest.fixture
def run(tmp_path):
    """A run that was begun with other settings than the demo's, and has computed nothing."""
    folder = tmp_path / "mine"
    save_config(load_config(None, ["distill.tokens=777", "search.trials=9"]), folder / CONFIG)
    return folder


def with_trials(run):
    (run / TRIALS).touch()
    return run


def with_finalists(run):
    (run / "finalists" / "AM").mkdir(parents=True)
    (run / "finalists" / "AM" / "result.json").touch()
    return run


@pytest.mark.parametrize("creates", [True, False])
def test_a_verb_takes_the_settings_of_the_run_and_does_not_rewrite_them(run, creates):
    before = (run / CONFIG).read_bytes()
    opened = open_run(None, run, ["search.trials=11"], creates=creates)
    assert (opened.config.distill.tokens, opened.config.search.trials) == (777, 11)
    assert opened.folder == run and not opened.writes_config
    assert (run / CONFIG).read_bytes() == before


def test_every_verb_uses_them(run, capsys):
    """The demo would distill 45,000 tokens."""
    assert distill(["--run", str(run), "--layout", "block_beginning:1:1", "--dry-run"]) == 0
    assert "with 777 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("address", ["s3://bucket/runs/demo", "gs://bucket/x", "file:///tmp/x", "memory://x"])
def test_an_address_is_no_run_folder(monkeypatch, tmp_path, capsys, address):
    """Not even a folder called "s3:" in the working directory."""
    monkeypatch.chdir(tmp_path)
    assert search(["--run", address, "--dry-run"]) == 2
    assert "must be on a disk; only cache.location may be an address" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_may_have_a_colon_in_its_name(tmp_path):
    assert open_run(None, tmp_path / "a:b", []).folder == tmp_path / "a:b"
    assert open_run(None, type(tmp_path)("runs/1:3"), []).folder.name == "1:3"


@pytest.mark.parametrize("verb", [evaluate])
def test_a_mistyped_run_folder_is_no_new_run(tmp_path, capsys, verb):
    assert verb(["--run", str(tmp_path / "typo")]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize(
    ("made", "override", "key"),
    [
        (with_trials, "distill.learning_rate=1e-5", "distill.learning_rate"),
        (with_trials, "search.rung_tokens=4000,9000", "search.rung_tokens"),
        (with_trials, "seed=4", "seed"),
        (with_trials, "student.state_sharing=per_kv_head", "student.state_sharing"),
        (with_trials, "align.tokens=9000", "align.tokens"),
        (with_finalists, "distill.tokens=9000", "distill.tokens"),
    ],
)
def test_what_finished_results_contradict_is_refused_with_the_key(run, made, override, key):
    made(run)
    for resume in (False, True):
        with pytest.raises(InputError, match=rf"^{key} is .*begin another run"):
            open_run(None, run, [override], resume=resume)


@pytest.mark.parametrize(
    "override",
    [
        "search.trials=40",
        "search.sampler=random",
        "distill.workers=3",
        "align.workers=2",
        "distill.checkpoint_every_tokens=100",
        "cache.actors=2",
        "cache.top_k=3",  # of no use to cache.format=hidden
        "cache.utterances_per_shard=3",
        "evaluate.sentences=3",
        "resources.cpus_per_worker=2",
    ],
)
def test_what_no_finished_result_depends_on_may_change(run, override):
    with_finalists(with_trials(run))
    opened = open_run(None, run, [override], resume=True)
    assert opened.writes_config, "a resumed search keeps its settings with its results"
    assert not open_run(None, run, [override]).writes_config, "another verb does not"


def test_trials_and_finalists_depend_on_the_learning_rate_that_each_was_trained_with(tmp_path):
    folder = tmp_path / "mine"
    save_config(load_config(None, ["distill.learning_rate=1e-4"]), folder / CONFIG)
    with_trials(folder)
    other_finalists = ["search.learning_rate=1e-4", "distill.learning_rate=3e-4"]
    config = open_run(None, folder, other_finalists).config
    assert (config.distill_of_trials.learning_rate, config.distill.learning_rate) == (1e-4, 3e-4)
    with pytest.raises(InputError, match=r"^distill.learning_rate is 0.0003, but .* trials made with 0.0001"):
        open_run(None, folder, ["distill.learning_rate=3e-4"])
    with pytest.raises(InputError, match=r"^search.learning_rate is 2e-05, but .* trials made with 0.0001"):
        open_run(None, folder, ["search.learning_rate=2e-5"])
    with_finalists(folder)
    with pytest.raises(InputError, match=r"^distill.learning_rate is 0.0003, but .* finalists made with 0.0001"):
        open_run(None, folder, other_finalists)


def test_a_search_does_not_go_on_with_settings_that_it_would_not_keep(run):
    with_trials(run)
    with pytest.raises(InputError, match=r"search\.trials: 9, not 40\); add --resume"):
        open_run(None, run, ["search.trials=40"], resume=False)
    assert open_run(None, run, ["search.trials=40"], resume=True).writes_config
    assert not open_run(None, run, [], resume=False).writes_config, "the same command goes on"


def test_a_run_that_has_computed_nothing_may_begin_anew(run):
    """Its error may have asked for another setting."""
    assert open_run("demo", run, ["evaluate.sentences=0"]).writes_config
    with_trials(run)
    with pytest.raises(InputError, match=r"another configuration \(search\.trials: 9, not 8\); add --resume"):
        open_run("demo", run, [])


def test_folders_that_are_no_run(tmp_path):
    with pytest.raises(InputError, match="holds no run to resume"):
        open_run(None, tmp_path / "nowhere", [], resume=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(InputError, match="not empty and no run"):
        open_run(None, tmp_path / "photos", [])
    (tmp_path / "file").touch()
    for name in ("file", "file/below", "x" * 300, "nul\0"):
        with pytest.raises(InputError):
            opened = open_run(None, tmp_path / name, [])
            lock_run(opened.folder)


def _hold(folder, held, release):
    lock = lock_run(folder)
    held.set()
    release.wait(30)
    del lock


def test_a_second_process_is_refused_while_the_first_lives(tmp_path):
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    first = context.Process(target=_hold, args=(tmp_path, held, release))
    first.start()
    assert held.wait(60)
    with pytest.raises(InputError, match="another process is working on"):
        lock_run(tmp_path)
    first.kill()  # a crash leaves no lock
    first.join()
    lock_run(tmp_path).release()


def test_results_of_another_teacher_are_refused(run):
    check_identity(run, "a" * 64, "corpus")
    check_identity(run, "b" * 64, "corpus")  # nothing was computed
    with_trials(run)
    with pytest.raises(InputError, match=r"results of another teacher .*set teacher\.path back"):
        check_identity(run, "a" * 64, "corpus")
    with pytest.raises(InputError, match=r"results of another corpus"):
        check_identity(run, "b" * 64, "other")
