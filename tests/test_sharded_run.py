"""The verb ``distill`` with a sharded student: killed with two workers, ended with one."""

import os
import signal
import subprocess
import sys
import time

import pytest
from test_search import short_folder  # noqa: F401 (a fixture)
from test_sharding import assert_same_weights
from tiny_search import write_search_space

from mamtra_ray.speech_lm.speech_lm import SpeechLM


@pytest.mark.slow
def test_killed_with_two_workers_and_ended_with_one(tmp_path, short_folder):  # noqa: F811
    space = write_search_space(
        tmp_path,
        student__initialization="transfer",
        distill__fully_shard=True,
        distill__micro_batch_tokens=60,
        distill__tokens=4000,
    )

    def start(run, *overrides):
        options = ["--space", str(space), "--run", str(tmp_path / run), "--layout", "AMAM", *overrides]
        return subprocess.Popen(
            [sys.executable, "-m", "mamtra_ray.distill", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
            start_new_session=True,
            env={**os.environ, "RAY_TMPDIR": str(short_folder)},
        )

    killed, deadline = start("killed"), time.monotonic() + 500
    # Ray Train's own list of checkpoints, which it goes on from.
    noted = tmp_path / "killed" / "train" / "checkpoint_manager_snapshot.json"
    while killed.poll() is None and not (noted.exists() and "checkpoint_2" in noted.read_text()):
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.1)
    assert killed.poll() is None, killed.communicate()[0]
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not list((tmp_path / "killed").glob("**/model.safetensors"))
    shards = [path.name for path in (tmp_path / "killed" / "train").glob("*/shards-*/*.distcp")]
    assert {"__0_0.distcp", "__1_0.distcp"} <= set(shards), "of both workers"
    alone = ("distill.workers=1", "distill.fully_shard=false")
    for run, overrides in (("killed", alone), ("whole", alone), ("sharded", ())):
        process = start(run, *overrides)
        output = process.communicate(timeout=500)[0]
        assert process.returncode == 0, output
        (tmp_path / f"{run}.txt").write_text(output)
    weights = {run: SpeechLM.load(tmp_path / run / "student").state_dict() for run in ("killed", "whole", "sharded")}
    for run in ("killed", "sharded"):
        assert_same_weights(weights[run], weights["whole"])
