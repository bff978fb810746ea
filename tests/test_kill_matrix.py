"""A search that is killed or stopped anywhere goes on and ends like one that was not.

Everything here takes minutes (an hour in all, on two cores): ``pytest -m slow tests/test_kill_matrix.py``, or a part of
it with ``-k "driver and trials"``.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from tiny_models import VOCABULARY
from tiny_search import write_search_space
from tiny_whisper import write_tiny_whisper

from mamtra_ray.layouts import Layout
from mamtra_ray.run.folder import read_run
from mamtra_ray.speech import tokenizer as tk
from mamtra_ray.speech.demo_codec import Codec, DecoderConfig, TokenDecoder

PHASES = ("cache", "align", "probe", "trials", "finalists", "speech", "export")
# The process that a phase leaves its work to, as Ray names it.
WORKERS = {
    "cache": r"ray::.*ShardWriter",
    "align": r"ray::_align_task",
    "probe": r"ray::ProbeActor",
    "trials": r"ray::ImplicitFunc",
    "finalists": r"ray::RayTrainWorker",
    "speech": r"ray::EvaluationWorker",
}
SECONDS = 420


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """A search of random models that goes through every phase."""
    folder = tmp_path_factory.mktemp("space")
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


class Search:
    """A search in a process group of its own, and what it has printed."""

    def __init__(self, space: Path, run: Path, *arguments: str) -> None:
        run.parent.mkdir(parents=True, exist_ok=True)
        self.log = run.parent / f"log-{time.monotonic_ns()}.txt"
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

    def wait_for(self, phase: str, worker: str | None = None) -> psutil.Process | None:
        """Until ``phase`` has begun (and its worker lives); returns the worker."""
        deadline = time.monotonic() + SECONDS
        heading = re.compile(rf"^\[\d/\d\] {phase}: (?!\d+:\d\d$)", re.M)
        while self.process.poll() is None and time.monotonic() < deadline:
            processes = self.look()
            if heading.search(self.text):
                if worker is None:
                    return None
                for process in processes:
                    try:
                        if re.match(worker, " ".join(process.cmdline())):
                            return process
                    except psutil.Error:
                        continue
            time.sleep(0.05)
        pytest.skip(f"{phase} was over before its process could be found") if worker else pytest.fail(self.text)

    def end(self) -> int:
        deadline = time.monotonic() + SECONDS
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.text
            self.look()
            time.sleep(0.2)
        return self.process.returncode

    def orphans(self, seconds: float = 30) -> list[str]:
        """What is left of its descendants after ``seconds``."""
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
def uninterrupted(space, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "runs" / "whole"
    search = Search(space, run)
    # Random models do not stop speaking: complete, but nothing that can be used.
    assert search.end() == 3, search.text
    assert search.orphans() == []
    return results(run)


def assert_same(run: Path, expected: dict) -> None:
    found = results(run)
    for name, rows in expected.items():
        if name != "trials":
            assert found[name] == rows, name
    # With several trials at once successive halving sees them in another order, so others may pass the first rung; as
    # many layouts are tried, and what both have trained is equal.
    both = found["trials"].keys() & expected["trials"].keys()
    assert {key: found["trials"][key] for key in both} == {key: expected["trials"][key] for key in both}
    for rows in (found["trials"], expected["trials"]):
        assert len({layout for layout, _ in rows}) == len({layout for layout, _ in expected["trials"]})


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda signum: signum.name)
def test_driver(space, uninterrupted, tmp_path, phase, signum):
    run = tmp_path / "runs" / "stopped"
    search = Search(space, run)
    search.wait_for(phase)
    os.kill(search.process.pid, signum)
    code = search.end()
    if signum != signal.SIGKILL:
        assert code == 128 + signum, search.text
        assert "Traceback" not in search.text and f"--resume --run {run}" in search.text.strip().splitlines()[-1]
        later = PHASES[PHASES.index(phase) + 1 :]
        assert not any(re.search(rf"^\[\d/\d\] {name}:", search.text, re.M) for name in later), "it went on"
    assert search.orphans() == []
    resumed = Search(space, run, "--resume")
    assert resumed.end() == 3, resumed.text
    assert_same(run, uninterrupted)
    assert read_run(run).phases[phase]["seconds"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("phase", WORKERS)
def test_worker(space, uninterrupted, tmp_path, phase):
    run = tmp_path / "runs" / "hurt"
    search = Search(space, run)
    worker = search.wait_for(phase, WORKERS[phase])
    worker.kill()
    assert search.end() == 3, search.text
    assert "Traceback" not in search.text
    assert search.orphans() == []
    assert_same(run, uninterrupted)


@pytest.mark.slow
def test_a_second_search_in_the_same_folder_is_refused_while_the_first_lives(space, tmp_path):
    run = tmp_path / "runs" / "busy"
    first = Search(space, run)
    first.wait_for("align")
    second = Search(space, run, "--resume")
    assert second.end() == 2
    assert "another process is working on" in second.text
    os.kill(first.process.pid, signal.SIGINT)
    assert first.end() == 130
    assert first.orphans() == []


def test_the_pattern_of_a_heading_is_no_closing_line():
    heading = re.compile(r"^\[\d/\d\] align: (?!\d+:\d\d$)", re.M)
    assert heading.search("[2/8] align: every layer's mixer") and not heading.search("[2/8] align: 0:07")
    assert Layout("AM") != Layout("MA")
