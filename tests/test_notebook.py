"""docs/demo.ipynb runs as a new user would run it, and is committed without what it gave."""

import importlib
import json
import os
import re
from pathlib import Path

import pytest

from mamtra_ray.__main__ import VERBS
from mamtra_ray.run.distilled import distilled_layout
from mamtra_ray.teachers.demo import tokenize_text

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "demo.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_it_is_committed_without_outputs():
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_its_verbs_names_and_words_are_there():
    text = "\n".join("".join(cell["source"]) for cell in CELLS)
    assert {"probe", "distill"} <= set(re.findall(r"-m mamtra_ray\.(\w+)", text)) <= set(VERBS)
    python = [source for source in CODE if not source.startswith("%%")]
    for source in python:
        compile(source, "a cell", "exec")
    for module, name in re.findall(r"^from (mamtra_ray[\w.]*) import (\w+)$", "\n".join(python), re.MULTILINE):
        assert hasattr(importlib.import_module(module), name)
    assert tokenize_text(re.search(r'sentence = "(.*)"', text)[1])


@pytest.mark.slow
def test_it_runs_from_the_probe_to_a_heard_sentence(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="pip install '.[test]'")
    nbformat = pytest.importorskip("nbformat", reason="pip install '.[test]'")
    pytest.importorskip("ipykernel", reason="pip install '.[test]'")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=1500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    said = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    layout = re.search(r"^([AM]{12})  KL [\d.]+$", said, re.MULTILINE)[1]
    assert str(distilled_layout(tmp_path / "runs" / "notebook")) == layout and layout.count("A") == 6
    heard = dict(re.findall(r"^(\w+): \d+ tokens a second.*\n  heard: '(.*)', word error rate", said, re.MULTILINE))
    sentence = re.search(r'sentence = "(.*)"', "\n".join(CODE))[1]
    assert set(heard) == {"teacher", layout}
    for text in heard.values():
        assert len(set(text.lower().rstrip(".").split()) & set(sentence.split())) >= 5, "most of its 7 words"
    shown = [output.data for output in outputs if output.output_type == "display_data"]
    assert sum("<audio" in data.get("text/html", "") for data in shown) == 2 and any("image/png" in d for d in shown)
