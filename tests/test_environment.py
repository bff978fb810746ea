"""environment.json: what it holds, its history, and what it says of changed versions."""

import json
import subprocess
import sys

import numpy
import pytest
import torch
import transformers

import mamtra_ray
from mamtra_ray.config import load_config
from mamtra_ray.errors import InputError
from mamtra_ray.evaluate.evaluation import deciding_versions
from mamtra_ray.runtime import environment
from mamtra_ray.runtime.environment import ENVIRONMENT, checkout_commit, note_session, versions


def sessions(folder):
    return json.loads((folder / ENVIRONMENT).read_text())["sessions"]


def test_versions_are_those_of_the_imported_packages():
    found = versions()
    # Where pip has 2.14.1, torch may call itself 2.14.1+cu130.
    assert torch.__version__.startswith(found["torch"]) and found.get("cuda") == torch.version.cuda
    assert found["numpy"] == numpy.__version__ and found["transformers"] == transformers.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["mamtra_ray"] == mamtra_ray.__version__
    assert versions(["numpy", "no-such-package"]) == {"numpy": numpy.__version__}


def test_every_session_is_kept_and_changes_are_said(tmp_path, monkeypatch):
    assert note_session(tmp_path, {"CPU": 2.0, "node:10.0.0.1": 1.0}) == []
    assert note_session(tmp_path) == [], "nothing changed"
    first, second = sessions(tmp_path)
    assert first["versions"] == second["versions"] == versions()
    assert first["cluster"] == {"CPU": 2.0} and first["time"] <= second["time"]
    assert first["machine"]["cores"] >= 1 and first["machine"]["memory_bytes"] > 2**28
    assert first["machine"]["capability"] == torch.backends.cpu.get_cpu_capability()

    other = {**versions(), "torch": "1.0", "s3tokenizer": "7"}
    torch_before = versions()["torch"]
    monkeypatch.setattr(environment, "versions", lambda: other)
    (line,) = note_session(tmp_path)
    assert f"torch {torch_before} -> 1.0" in line and "s3tokenizer none -> 7" in line and "numpy" not in line
    assert "\n" not in line and len(sessions(tmp_path)) == 3


def test_a_damaged_file_is_one_sentence(tmp_path):
    (tmp_path / ENVIRONMENT).write_text("{")
    with pytest.raises(InputError, match=r"environment\.json is damaged"):
        note_session(tmp_path)


def test_commit_of_a_checkout(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert checkout_commit(tmp_path) is None
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "first")
    assert git("rev-parse", "HEAD").startswith(checkout_commit(tmp_path))
    (tmp_path / "untracked").write_text("")
    assert "uncommitted" not in checkout_commit(tmp_path)
    (tmp_path / "file").write_text("two")
    assert checkout_commit(tmp_path).endswith(" with uncommitted changes")
    (tmp_path / ".git" / "HEAD").write_text("no reference")
    assert checkout_commit(tmp_path).startswith("unknown (")


def test_only_what_speaks_and_hears_decides_about_rows(tmp_path):
    def of(*overrides):
        return set(deciding_versions(load_config(None, list(overrides))))

    assert {"torch", "faster-whisper", "ctranslate2"} <= of()
    assert not of() & {"transformers", "ray", "optuna", "python", "numpy"}
    assert of(f"evaluate.recognizer=whisper:{tmp_path}") >= {"torch", "transformers"}
    assert "ctranslate2" not in of(f"evaluate.recognizer=whisper:{tmp_path}")
    (tmp_path / "config.json").write_text("{}")
    assert "transformers" in of(f"evaluate.codec={tmp_path}"), "an Xcodec2 folder is decoded by transformers"
