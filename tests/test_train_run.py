"""A Ray Train run whose worker dies goes on from its checkpoint; one that refuses its input is not tried again."""

import os
import signal
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
import ray.train
from ray.train.torch import TorchTrainer

from mamtra_ray.errors import DivergedError
from mamtra_ray.runtime.train_run import fit


def trainer(folder, fails):
    """Four steps with a checkpoint after each; ``fails`` says what happens before the third, at first."""

    # Inside, so that it travels to the worker as it is: no worker could import this file.
    def steps(config):
        attempts = Path(config["attempts"])
        attempts.write_text(f"{attempts.read_text() if attempts.exists() else ''}.")
        start, first = ray.train.get_checkpoint(), 0
        if start:
            with start.as_directory() as folder:
                first = int((Path(folder) / "step").read_text()) + 1
        for step in range(first, 4):
            if step == 2 and len(attempts.read_text()) == 1:
                if config["fails"] == "killed":
                    time.sleep(3)  # the reports must have arrived
                    os.kill(os.getpid(), signal.SIGKILL)
                raise DivergedError("the gradient is not finite: lower distill.learning_rate")
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "step").write_text(str(step))
                ray.train.report({"step": step, "first": first}, checkpoint=ray.train.Checkpoint.from_directory(folder))

    return TorchTrainer(
        steps,
        train_loop_config={"fails": fails, "attempts": str(folder / "attempts")},
        scaling_config=ray.train.ScalingConfig(num_workers=1),
        run_config=ray.train.RunConfig(name="train", storage_path=str(folder)),
    )


@pytest.mark.slow
def test_a_killed_worker_goes_on_from_its_last_checkpoint(ray_cluster, tmp_path):
    result = fit(partial(trainer, tmp_path, "killed"), tmp_path)
    assert (tmp_path / "attempts").read_text() == ".."
    assert result.metrics["step"] == 3 and result.metrics["first"] in (1, 2), "it began anew"


def test_a_refusal_is_said_at_once_in_its_own_words(ray_cluster, tmp_path):
    with pytest.raises(DivergedError, match=r"^the gradient is not finite: lower distill.learning_rate$"):
        fit(partial(trainer, tmp_path, "refuses"), tmp_path)
    assert (tmp_path / "attempts").read_text() == ".", "what fails in the same way again was tried again"
