"""MLflow and Weights & Biases, by Ray's own callbacks on stand-ins of the two packages."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from mamtra_ray.search import __main__ as search

MLFLOW = {
    "mlflow/tracking.py": "from mlflow import MlflowClient",
    "mlflow/exceptions.py": "class MlflowException(Exception): pass",
    "mlflow/utils/__init__.py": "",
    "mlflow/utils/mlflow_tags.py": "MLFLOW_RUN_NAME = 'mlflow.runName'",
    "mlflow/__init__.py": """
import json, os
def _note(*what):
    with open(os.environ["NOTES"], "a") as file:
        file.write(json.dumps([str(part) for part in what]) + "\\n")
class _Info:
    run_id = experiment_id = "7"
class _Run:
    info = _Info()
class _Client:
    def __init__(self, address="", *args, **kwargs):
        if address.startswith("file:"):
            from mlflow.exceptions import MlflowException
            raise MlflowException("The filesystem tracking backend is in maintenance mode.\\nUse a database.")
    def __getattr__(self, name): return lambda *args, **kwargs: _note(name, *args, *kwargs.values()) or _Run()
MlflowClient = _Client
__version__ = "2.0"
def get_experiment(*args, **kwargs): raise ValueError
def get_run(run_id): return _Run()
def active_run(): return None
def get_experiment_by_name(*args, **kwargs): return None
def get_tracking_uri(): return None
def get_registry_uri(): return None
def set_registry_uri(uri): pass
def set_tracking_uri(uri): _note("set_tracking_uri", uri)
def create_experiment(name, **kwargs): return _note("create_experiment", name) or "1"
""",
}
WANDB = {
    "wandb/__init__.py": "",
    "wandb/util.py": "json_dumps_safer = None",
    "wandb/wandb_run.py": "Run = None",
    "wandb/sdk/__init__.py": "",
    "wandb/sdk/data_types/__init__.py": "",
    "wandb/sdk/data_types/image.py": "Image = None",
    "wandb/sdk/data_types/video.py": "Video = None",
    "wandb/sdk/data_types/base_types/__init__.py": "",
    "wandb/sdk/data_types/base_types/wb_value.py": "WBValue = None",
}
A_TRIAL_IS_TOLD = """
import sys
from pathlib import Path
from types import SimpleNamespace
from mamtra_ray.search.loggers import logger_callbacks
mlflow, wandb = logger_callbacks(["mlflow", "wandb"], Path(sys.argv[1]))
class Trial(SimpleNamespace):
    __hash__ = object.__hash__
trial = Trial(config={"layout": "AMAM"}, trial_id="t")
mlflow.setup()
mlflow.log_trial_start(trial)
mlflow.log_trial_result(1, trial, {"ce": 1.5, "wer": 0.25, "training_iteration": 1, "timesteps_total": None})
mlflow.log_trial_end(trial)
print(type(wandb).__name__, wandb.project, wandb.group, wandb.kwargs["dir"])
"""


def test_trials_reach_both_through_rays_callbacks(tmp_path):
    for name, content in {**MLFLOW, **WANDB}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    run, notes = tmp_path / "runs" / "demo", tmp_path / "notes.jsonl"
    path = os.pathsep.join([str(tmp_path), *sys.path])
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "WANDB"))}
    process = subprocess.run(
        [sys.executable, "-c", A_TRIAL_IS_TOLD, str(run)],
        env={**environment, "PYTHONPATH": path, "NOTES": str(notes), "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ["WandbLoggerCallback", "mamtra_ray", "demo", str(run)]
    noted = [json.loads(line) for line in notes.read_text().splitlines()]
    assert ["set_tracking_uri", f"sqlite:///{run}/mlflow.db"] in noted and ["create_experiment", str(run)] in noted
    assert any(note[0] == "create_run" and str(run) in note[-1] for note in noted)
    assert ["log_param", "7", "layout", "AMAM"] in noted
    assert any(note[:4] == ["log_metric", "7", "ce", "1.5"] for note in noted)
    assert any(note[:4] == ["log_metric", "7", "wer", "0.25"] for note in noted)


@pytest.mark.parametrize(
    ("name", "variables", "reason"),
    [
        (
            "mlflow",
            {"MLFLOW_TRACKING_URI": "file:///tmp/mlruns"},
            r"cannot use file:///tmp/mlruns: The filesystem .* Use",
        ),
        ("wandb", {}, r"set WANDB_API_KEY, or WANDB_MODE=offline"),
    ],
)
def test_an_address_or_a_key_that_is_missing_is_one_sentence(name, variables, reason, tmp_path):
    for path, content in {**MLFLOW, **WANDB}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW", "WANDB"))}
    code = (
        "from pathlib import Path\nfrom mamtra_ray.errors import InputError\n"
        "from mamtra_ray.search.loggers import logger_callbacks\n"
        f"try:\n    logger_callbacks([{name!r}], Path('run'))\nexcept InputError as error:\n    print(error)"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, **variables, "PYTHONPATH": path, "NOTES": str(tmp_path / "notes"), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert re.search(reason, process.stdout) and process.stdout.count("\n") == 1


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_one_that_is_not_installed_is_refused_at_once(name, tmp_path, capsys, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda asked, *rest: None if asked == name else there(asked, *rest))
    arguments = ["--space", "demo", "--run", str(tmp_path / "run"), f"search.loggers={name}"]
    for more in ([], ["--dry-run"]):
        assert search.main([*arguments, *more]) == 2
        assert capsys.readouterr().err == (
            f"error: search.loggers has {name}, which is not installed: pip install {name}, or leave it out\n"
        )
    assert not (tmp_path / "run").exists()
    assert search.main([*arguments[:-1], "search.loggers=other"]) == 2
    assert "search.loggers" in capsys.readouterr().err
