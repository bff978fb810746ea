"""A search that is killed or stopped anywhere goes on and ends like one that was not.

Everything here takes minutes (an hour in all, on two cores): ``pytest -m slow tests/test_kill_matrix.py``, or a part of
it with ``-k "stopped and trials"``. A folder named by ``KILL_MATRIX`` keeps the uninterrupted search, with which all
cells begin and are compared, for the next call with the same code.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import pytest
import ray.cluster_utils
import torch
from tiny_models import VOCABULARY
from tiny_search import write_search_space
from tiny_whisper import write_tiny_whisper

from mamtra_ray.run.folder import read_run
from mamtra_ray.run.names import COSTS, REPORT
from mamtra_ray.runtime.progress import Costs
from mamtra_ray.speech import tokenizer as tk
from mamtra_ray.speech.demo_codec import Codec, DecoderConfig, TokenDecoder

# What each phase leaves, in the folder of all runs. A cell begins where the phase before its own has ended.
OUTPUTS = {
    "cache": ["shared/cache-*"],
    "align": ["shared/mixers-*"],
    "probe": ["whole/probe.parquet"],
    "trials": ["whole/trials.*", "whole/curves.*", "whole/trial_states", "whole/tune", "whole/optuna.journal*"],
    "finalists": ["whole/finalists"],
    "speech": ["whole/evaluation", "whole/audio"],
    "export": ["whole/best", "whole/finalists.parquet", "whole/reference.json", "whole/report*", "whole/costs.json"],
}
PHASES = tuple(OUTPUTS)
# The processes that a phase leaves its work to, as Ray names them.
WORKERS = {
    "cache": [r"ray::.*ShardWriter"],
    "align": [r"ray::_align_task"],
    "probe": [r"ray::ProbeActor"],
    "trials": [r"ray::ImplicitFunc", r"ray::TrialTable"],
    "finalists": [r"ray::RayTrainWorker", r"ray::TrialTable"],
    "speech": [r"ray::EvaluationWorker"],
}
RAYLET = r"\S*/raylet "
SIGNALS = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL}
SECONDS = 900


def each_and_every(phases: Iterable[str]) -> pytest.MarkDecorator:
    """One phase, or one after the other in the same run: hardly dearer than one."""
    phases = tuple(phases)
    return pytest.mark.parametrize("phases", [*((phase,) for phase in phases), phases], ids=[*phases, "every"])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Path(os.environ.get("KILL_MATRIX") or tmp_path_factory.mktemp("whole")).absolute()


@pytest.fixture(scope="module")
def space(place):
    """A search of random models that goes through every phase."""
    folder = place / "space"
    if (folder / "space.yaml").exists():
        return folder / "space.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    codebook = torch.randn(VOCABULARY.speech_size, tk.FRAMES_PER_TOKEN * tk.NUM_MELS)
    codec = Codec(tk.Tokenizer(codebook), TokenDecoder(DecoderConfig(channels=8, num_blocks=1)), {"made": "by a test"})
    codec.save(folder / "codec.safetensors")
    return write_search_space(
        folder,
        align__tokens=6000,
        probe__num_layouts=5,
        search__sampler="random",
        search__trials=4,
        search__rung_tokens=[2000, 4000],
        distill__tokens=4000,
        distill__checkpoint_every_tokens=2000,
        distill__workers=1,
        evaluate__sentences=4,
        evaluate__codec=str(folder / "codec.safetensors"),
        evaluate__recognizer=f"whisper:{write_tiny_whisper(folder / 'whisper')}",
        evaluate__normalization="whisper_basic",
    )


class PhaseIsOverError(Exception):
    """A process was looked for in vain."""


def heading_of(phase: str) -> re.Pattern[str]:
    """Of a phase that begins; its last line has the time that it took instead."""
    return re.compile(rf"^\[\d/\d\] {phase}: (?!\d+:\d\d$)", re.M)


class Search:
    """A search in a process group of its own, and what it has printed."""

    def __init__(self, space: Path, run: Path, *arguments: str, logs: Path) -> None:
        self.log = logs / f"log-{time.monotonic_ns()}.txt"
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-m", "mamtra_ray.search", "--space", str(space), "--run", str(run), *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )
        self.family: dict[int, psutil.Process] = {}

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def look(self) -> list[psutil.Process]:
        """The process and its descendants, which are remembered also when their parent is gone."""
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            found = []
        self.family |= {process.pid: process for process in found}
        return found

    def wait_for(self, phase: str, process: str | None = None) -> psutil.Process | None:
        """Until ``phase`` has begun, and a process of its with this command line lives, which is returned.

        Raises:
            PhaseIsOverError: it was not found in time.
        """
        deadline = time.monotonic() + SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            processes = self.look()
            if heading_of(phase).search(self.text):
                if process is None:
                    return None
                for found in processes:
                    with contextlib.suppress(psutil.Error):
                        if re.match(process, " ".join(found.cmdline())):
                            return found
            if re.search(rf"^\[\d/\d\] {phase}: \d+:\d\d$", self.text, re.M):
                break
            time.sleep(0.02)
        raise PhaseIsOverError(self.text)

    def end(self) -> int:
        deadline = time.monotonic() + SECONDS
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.text
            self.look()
            time.sleep(0.2)
        return self.process.returncode

    def orphans(self, seconds: float = 30) -> list[str]:
        """What is left of its descendants after ``seconds`` of a machine that is not overloaded."""
        seconds *= max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
        _, alive = psutil.wait_procs(list(self.family.values()), timeout=seconds)
        return [" ".join(process.cmdline()) for process in alive if process.is_running()]


def results(run: Path) -> dict:
    """All that must be the same, bit for bit; not seconds, nor where a layout was first proposed."""
    found = read_run(run)
    trials = {(row.layout, row.rung): (row.ce, row.kl, row.tokens) for row in found.trials}
    assert len(trials) == len(found.trials), "a rung of a layout was paid for twice"
    return {
        "probe": {row.layout: (row.ce, row.kl) for row in found.probe},
        "trials": trials,
        "finalists": {row.layout: (row.ce, row.kl, row.tokens, row.wer, row.cer) for row in found.finalists},
        "best": found.best_layout,
    }


@pytest.fixture(scope="module")
def uninterrupted(space, place):
    """The folder of all runs after a search that nothing has stopped."""
    runs = place / "runs"
    if not (runs / "whole" / REPORT).exists():
        search = Search(space, runs / "whole", logs=place)
        # Random models do not stop speaking: complete, but nothing that can be used.
        assert search.end() == 3, search.text
        assert search.orphans() == []
    return runs


def copy_before(phase: str, runs: Path, folder: Path) -> Path:
    """All that was there before ``phase`` began, as ``folder``; returns its run."""
    shutil.copytree(runs, folder, dirs_exist_ok=True)
    for later in PHASES[PHASES.index(phase) :]:
        for path in (path for pattern in OUTPUTS[later] for path in folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder / "whole"


def assert_same(run: Path, whole: Path) -> None:
    found, expected = results(run), results(whole / "whole")
    for name, rows in expected.items():
        if name != "trials":
            assert found[name] == rows, name
    # With several trials at once successive halving sees them in another order, so others may pass the first rung; as
    # many layouts are tried, and what both have trained is equal.
    both = found["trials"].keys() & expected["trials"].keys()
    assert {key: found["trials"][key] for key in both} == {key: expected["trials"][key] for key in both}
    for rows in (found["trials"], expected["trials"]):
        assert len({layout for layout, _ in rows}) == len({layout for layout, _ in expected["trials"]})


def assert_stopped_with_one_line(search: Search, codes: Iterable[int], phase: str, says: str) -> None:
    assert search.end() in codes, search.text
    deadline = time.monotonic() + 10
    while not re.search(says, search.text.strip().splitlines()[-1]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "Traceback" not in search.text, search.text
    assert re.search(says, search.text.strip().splitlines()[-1]), search.text
    later = PHASES[PHASES.index(phase) + 1 :]
    assert not any(re.search(rf"^\[\d/\d\] {name}:", search.text, re.M) for name in later), search.text


def stop(search: Search, run: Path, phase: str, how: str) -> None:
    """Stop it in a phase, and look at how it ends."""
    search.wait_for(phase)
    if how == "raylet":
        search.wait_for(phase, RAYLET).kill()
        # Ray ends the driver itself, with code 1, where it notices first.
        says = "^error: (Ray lost|the process was ended by force) .* goes on where it stopped$"
        if phase == "export" and search.end() == 3:
            return  # what is left to do needs no Ray, and is done
        assert_stopped_with_one_line(search, (1, 2), phase, says)
    elif how == "full_disk":
        filler = run.parent / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(1 << 12)):
                pass
        assert_stopped_with_one_line(search, (2,), phase, "^error: no space left to write .*/runs/")
        filler.unlink()
    else:
        os.kill(search.process.pid, SIGNALS[how])
        go_on = f"stopped by {how}; go on with: python -m mamtra_ray.search --resume --run {run}"
        if how == "SIGKILL":
            assert_stopped_with_one_line(search, (-signal.SIGKILL,), phase, "^error: .* goes on where it stopped$")
        else:
            assert_stopped_with_one_line(search, (128 + SIGNALS[how],), phase, re.escape(go_on))
    assert search.orphans() == []


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Mounted there."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("how", [*SIGNALS, "raylet", "full_disk"])
@each_and_every(PHASES)
def test_stopped(space, uninterrupted, tmp_path, phases, how):
    runs = tmp_path / "runs"
    with small_disk(runs) if how == "full_disk" else contextlib.nullcontext():
        run = copy_before(phases[0], uninterrupted, runs)
        for phase in phases:
            stop(Search(space, run, "--resume", logs=tmp_path), run, phase, how)
        notes = how not in ("SIGKILL", "full_disk")  # which may leave no time and no space to note any
        if notes:
            noted = {phase: Costs(run / COSTS).phases[phase]["seconds"] for phase in phases}
        resumed = Search(space, run, "--resume", logs=tmp_path)
        assert resumed.end() == 3, resumed.text
        assert resumed.orphans() == []
        assert_same(run, uninterrupted)
        if notes:
            assert all(Costs(run / COSTS).phases[phase]["seconds"] >= noted[phase] > 0 for phase in phases)


@pytest.mark.slow
@each_and_every(WORKERS)
def test_worker_killed(space, uninterrupted, tmp_path, phases):
    run = copy_before(phases[0], uninterrupted, tmp_path / "runs")
    search = Search(space, run, "--resume", logs=tmp_path)
    for phase in phases:
        for worker in WORKERS[phase]:
            search.wait_for(phase, worker).kill()
    assert search.end() == 3, search.text
    assert "Traceback" not in search.text, search.text
    assert search.orphans() == []
    assert_same(run, uninterrupted)


@pytest.mark.slow
@each_and_every(PHASES)
def test_node_lost(space, uninterrupted, tmp_path, phases):
    """Of two nodes the one dies that the search does not run on; another one comes. (Both see the run's folder.)"""
    run = copy_before(phases[0], uninterrupted, tmp_path / "runs")
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # a socket's path has 107 bytes at most
        cluster = ray.cluster_utils.Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "temp_dir": folder, "include_dashboard": False}
        )
        try:
            node = cluster.add_node(num_cpus=1)
            cluster.wait_for_nodes()
            search = Search(space, run, "--resume", "--address", cluster.address, logs=tmp_path)
            for phase in phases:
                search.wait_for(phase)
                cluster.remove_node(node, allow_graceful=False)
                node = cluster.add_node(num_cpus=1)
            assert search.end() == 3, search.text
        finally:
            cluster.shutdown()
    assert "Traceback" not in search.text, search.text
    assert_same(run, uninterrupted)


@pytest.mark.slow
def test_a_second_search_in_the_same_folder_is_refused_while_the_first_lives(space, tmp_path):
    run = tmp_path / "runs" / "busy"
    first = Search(space, run, logs=tmp_path)
    first.wait_for("align")
    second = Search(space, run, "--resume", logs=tmp_path)
    assert second.end() == 2
    assert "another process is working on" in second.text
    os.kill(first.process.pid, signal.SIGINT)
    assert first.end() == 130
    assert first.orphans() == []


def test_the_pattern_of_a_heading_is_no_closing_line():
    assert heading_of("align").search("[2/8] align: every layer's mixer") and not heading_of("align").search(
        "[2/8] align: 0:07"
    )
