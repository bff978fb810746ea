"""The search as a user runs it: killed in the middle, resumed, exported, loaded by plain transformers."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
import torch
from tiny_search import write_search_space

from mamtra_ray.config import ResourcesConfig, load_config, save_config
from mamtra_ray.errors import InputError
from mamtra_ray.run.names import CONFIG
from mamtra_ray.runtime.cluster import connect
from mamtra_ray.runtime.resources import WorkerResources, check_resources, worker_resources
from mamtra_ray.search import __main__ as search
from mamtra_ray.speech_lm.speech_lm import SpeechLM

LOAD_WITHOUT_US = """
import sys, torch
sys.modules["mamtra_ray"] = None  # importing it would fail
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(torch.tensor([[71, 1, 2, 72, 73, 40, 50]])).logits, sys.argv[2])
"""


def start(space: Path, run: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mamtra_ray.search", "--space", str(space), "--run", str(run), *arguments]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=space.parent,
        start_new_session=True,
        env={**os.environ, **environment},
    )


# What dependencies say about their own calls.
NOT_ABOUT_US = re.compile(
    "`use_(push_based_shuffle|polars|arrow_tensor_v2)` is deprecated|site-packages/ray/.*PydanticDeprecatedSince20"
)


def deprecations(output: str, logs: Path) -> list[str]:
    """Lines of a driver's output and of its Ray workers' that say that a call will stop working."""
    # Not those of Ray's own processes, such as its dashboard.
    texts = [output, *(path.read_text(errors="replace") for path in logs.glob("ray/session_2*/logs/worker-*"))]
    assert len(texts) > 2, "no worker has written a log"
    lines = [line for text in texts for line in text.splitlines()]
    return [
        line
        for line in lines
        if re.search("DeprecationWarning|FutureWarning|is deprecated", line)
        if not NOT_ABOUT_US.search(line)
    ]


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """For Ray's files: the paths of its sockets may not be longer than 107 bytes, as those of ``tmp_path`` would be."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        yield Path(folder)


def rows_of(run: Path, name: str = "trials") -> list[dict]:
    path = run / f"{name}.parquet"
    return pq.read_table(path).to_pylist() if path.exists() else []


@pytest.mark.slow
def test_killed_and_resumed_search_pays_for_no_layout_twice(tmp_path, short_folder, pytestconfig):
    space, run = write_search_space(tmp_path), tmp_path / "runs" / "first"
    warned = {"PYTHONWARNINGS": "always::DeprecationWarning,always::FutureWarning", "RAY_TMPDIR": str(short_folder)}
    process = start(space, run, **warned)
    deadline = time.monotonic() + 240
    while process.poll() is None and not any(row["status"] == "finished" for row in rows_of(run)):
        assert time.monotonic() < deadline, "no trial finished"
        time.sleep(0.2)
    assert process.poll() is None, process.communicate()[0]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {(row["layout"], row["rung"]): row for row in rows_of(run)}
    assert before

    resumed = start(space, run, "--resume", **warned)
    output = resumed.communicate(timeout=300)[0]
    assert resumed.returncode == 0, output
    if "ignore::DeprecationWarning" not in (pytestconfig.getoption("pythonwarnings") or ()):  # make test-oldest
        assert not deprecations(output, short_folder)
    sessions = json.loads((run / "environment.json").read_text())["sessions"]
    assert len(sessions) == 2 and all(
        torch.__version__.startswith(session["versions"]["torch"]) for session in sessions
    )
    assert sessions[1]["command"][0] == "mamtra_ray.search" and "--resume" in sessions[1]["command"]
    assert "versions have changed" not in output
    after = {(row["layout"], row["rung"]): row for row in rows_of(run)}
    assert len(after) == len(rows_of(run)), "a rung of a layout was paid for twice"
    for key, row in before.items():
        assert {**after[key], "status": None} == {**row, "status": None}, "a recorded rung was trained again"

    assert "MMAA" in {row["layout"] for row in after.values()}, "the paper's layouts are always candidates"
    assert all(row["ce"] < row["ce_start"] for row in after.values()), "training must train"
    assert not list((run / "trial_states").iterdir()), "finished trials keep no training state"
    finalists = rows_of(run, "finalists")
    assert "back" in {row["origin"] for row in finalists} and len(finalists) == 2, "the paper's and the best found one"
    assert "checkpoint" in output and str(run / "report.html") in output
    assert "generation equals a full forward pass" in output
    last = output.strip().splitlines()[-1]
    assert last.endswith("because no speech was generated (evaluate.sentences=0)") and " (teacher " in last
    for row in finalists:
        assert [row[name] for name in ("not_stopped", "stopped_at_once", "failed", "alarm")] == [None] * 4
    assert (run / "report.html").stat().st_size > 10_000
    costs = json.loads((run / "costs.json").read_text())
    assert set(costs["phases"]) >= {"cache", "align", "trials", "finalists"}
    trained = max(row["tokens"] for row in after.values()), sum(row["tokens"] for row in finalists)
    rungs = {row["rung"]: row for row in costs["rungs"]}
    assert rungs["finalists"]["tokens"] == trained[1] and rungs["all"]["teacher_tokens_saved"] > sum(trained)
    for row in finalists:
        curve = [point for point in rows_of(run, "curves") if point["trial_id"] == "finalist"]
        tokens = [point["tokens"] for point in curve if point["layout"] == row["layout"]]
        assert tokens == sorted(set(tokens)) and tokens[0] < 300 < tokens[-1], "both parts of the training, once"

    best = json.loads((run / "best" / "layout.json").read_text())["layout"]
    assert best in {row["layout"] for row in finalists}
    subprocess.run([sys.executable, "-c", LOAD_WITHOUT_US, str(run / "best"), str(tmp_path / "logits.pt")], check=True)
    student = SpeechLM.load(run / "finalists" / best / "student").eval()
    speech = slice(student.vocabulary.speech_offset, student.vocabulary.control_offset)
    with torch.no_grad():
        expected = student(torch.tensor([[71, 1, 2, 72, 73, 40, 50]]))
    found = torch.load(tmp_path / "logits.pt", weights_only=True)[..., speech]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_dry_run_starts_nothing(tmp_path, capsys):
    space, run = write_search_space(tmp_path), tmp_path / "runs" / "dry"
    # Overrides may stand anywhere among the options.
    arguments = ["distill.tokens=700", "--space", str(space), "--run", str(run), "search.trials=5", "--dry-run"]
    assert search.main(arguments) == 0
    plan = capsys.readouterr().out
    assert "MMAA  1:1  back" in plan and "TFLOP" in plan
    assert "5 layouts, rungs" in plan and "2 layouts x 700 tokens" in plan
    assert not run.exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["search.trails=3"], "did you mean 'trials'"),
        (["--resume", "--run", "nowhere"], "holds no run to resume"),
        (["search.ratios=1:6", "--run", "new"], "does not fit 4 layers"),
        (["search.strategies=frnt"], "did you mean 'front'"),
        (["teacher.path=/nowhere", "--run", "new"], "/nowhere"),
        (["corpus.path=/nowhere.parquet", "--run", "new"], "/nowhere.parquet"),
        (["--space", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["teacher.kind=cosyvoice", "--run", "new"], "did you mean 'cosyvoice2'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, sentence):
    space = write_search_space(tmp_path)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()  # the progress of saving the teacher
    if "--space" not in arguments:
        arguments = ["--space", str(space), *arguments]
    assert search.main(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_too_few_resources_are_said_before_anything_starts():
    demo, of_gpus = load_config(None, ["distill.workers=2"]), load_config(None, ["resources.gpus_per_worker=1"])
    check_resources(demo, WorkerResources(), {"CPU": 2.0})
    with pytest.raises(InputError, match=r"distill\.workers.* 2 workers x 1 CPU = 2, but the cluster has 1"):
        check_resources(demo, WorkerResources(), {"CPU": 1.0})
    with pytest.raises(InputError, match="1 GPU = 1, but the cluster has 0"):
        check_resources(of_gpus, worker_resources(of_gpus.resources, {"CPU": 2.0}), {"CPU": 2.0})


@pytest.mark.parametrize(
    ("asked", "cluster", "gpus", "slots"),
    [
        ({}, {"CPU": 6}, 0, 6),
        ({}, {"CPU": 6, "GPU": 4}, 1, 4),
        ({"gpus_per_worker": 0}, {"CPU": 6, "GPU": 4}, 0, 6),
        ({"gpus_per_worker": 0.5}, {"CPU": 6, "GPU": 4}, 0.5, 6),
        ({"cpus_per_worker": 4}, {"CPU": 6}, 0, 1),
    ],
)
def test_who_decides_about_gpus(asked, cluster, gpus, slots):
    worker = worker_resources(ResourcesConfig(**asked), cluster)
    assert worker.gpus == gpus and worker.slots(cluster) == slots
    assert worker.options() == {"num_cpus": worker.cpus, "num_gpus": gpus}


@pytest.mark.parametrize(
    "said",
    [
        "The current node timed out during startup. This could happen because some of the raylet failed to startup or"
        " the GCS has become overloaded.",
        "Failed to start the dashboard, return code 1\n\n  The last 20 lines of dashboard.log:\n  ...",
    ],
)
def test_a_cluster_that_does_not_start_is_one_sentence(monkeypatch, said):
    """Ray raises a plain Exception for both."""

    def refuses(**_: object) -> None:
        raise Exception(said)

    monkeypatch.setattr("ray.init", refuses)
    with pytest.raises(InputError, match="Ray does not start on this machine") as caught:
        connect("local")
    assert " ".join(said.split()) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("fail", ["all", "one"])
def test_trials_that_fail_are_counted_and_said_at_the_end(tmp_path, ray_cluster, capsys, fail):
    """A file stands where a trial keeps its training state: that layout fails, or all of them."""
    space, run = write_search_space(tmp_path, distill__workers=1), tmp_path / "runs" / "failing"
    save_config(load_config(space), run / CONFIG)
    blocked = run / "trial_states" if fail == "all" else run / "trial_states" / "MMAA"
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.touch()
    code = search.main(["--run", str(run)])
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    assert "MMAA" not in {row["layout"] for row in rows_of(run)}
    traceback = run / "trial_failures" / "MMAA.txt"
    assert traceback.read_text().startswith("Traceback")
    if fail == "all":
        assert code == 2 and rows_of(run) == []
        last = printed.err.strip().splitlines()[-1]
        assert re.match(r"error: all 3 trials failed; the first one: [AM]{4}: NotADirectoryError: ", last)
        assert "finalists:" not in printed.out
    else:
        assert code == 0 and len({row["layout"] for row in rows_of(run)}) == 2
        alarm, _verdict = printed.out.strip().splitlines()[-2:]
        assert alarm.startswith("alarm: 1 trial failed: MMAA: ") and str(traceback) in alarm
    for name in ray.util.list_named_actors():  # they would have ended with the search's process
        ray.kill(ray.get_actor(name))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "localhost:99999"])
def test_an_absent_cluster_is_one_sentence_at_once(address):
    with pytest.raises(InputError, match=f"no Ray cluster answers at '{address}'"):
        connect(address)
