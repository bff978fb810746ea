"""GGUF files for llama.cpp: a reading of its graph in NumPy computes what our model does, and so does llama.cpp."""

import builtins
import dataclasses
import json
import os
import re
import subprocess
import sys
from importlib import util

import numpy as np
import pytest
import torch
from llama_cpp_graph import GraniteHybrid
from made_run import finalist_row
from test_export_check import place  # noqa: F401 (a fixture)
from test_granite import CASES, make_exportable
from tiny_models import LLAMA3_ROPE, SEQUENCE, VOCABULARY, transformers_model, write_folder

from mamtra_ray.config import TeacherConfig
from mamtra_ray.errors import InputError
from mamtra_ray.export import checkpoint as export
from mamtra_ray.export import llama_cpp_check
from mamtra_ray.export.__main__ import main
from mamtra_ray.export.check import ExportCheck, ExportCheckError
from mamtra_ray.export.llama_cpp_check import check_gguf
from mamtra_ray.models.granite_gguf import check_gguf_possible, gguf_obstacle, write_granite_gguf
from mamtra_ray.speech_lm.generate import generate
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.teachers import load_teacher

SHAPES = {
    **{name: case for name, case in CASES.items() if name.startswith("qwen2")},
    "mixers twice as wide as the model": ("qwen2", "AMMA", "per_query_head", False, {"head_dim": 16}),
    "llama3 RoPE, head is the table": ("llama", "AMAM", "per_query_head", False, {}),
    "linear RoPE": (
        *("llama", "MAMA", "per_kv_head", True),
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
    ),
}
IDS = torch.randint(VOCABULARY.size, (40,), generator=torch.Generator().manual_seed(1))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
needs_llama_cpp = pytest.mark.skipif(util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")


def write(path, student, dtype=torch.float32):
    write_granite_gguf(path, student.config, student.state_dict(), dataclasses.asdict(student.vocabulary), dtype)
    return path


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    root = tmp_path_factory.mktemp("students")
    return {name: make_exportable(*case, root / str(number)) for number, (name, case) in enumerate(SHAPES.items())}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_graph_of_llama_cpp_computes_the_same(students, shape, tmp_path):
    student = students[shape]
    model = GraniteHybrid(write(tmp_path / "model.gguf", student))
    with torch.no_grad():
        expected_LS = (student.hidden_states(IDS[None]) @ student.head.weight.T)[0]
    found_LV = torch.from_numpy(model.logits(IDS.numpy())).float()
    speech = slice(VOCABULARY.speech_offset, VOCABULARY.speech_offset + VOCABULARY.speech_size)
    torch.testing.assert_close(found_LV[:, speech], expected_LS, atol=2e-5, rtol=2e-5)
    if "output.weight" in model.tensors:
        found_LV[:, speech] = 0
        assert found_LV.abs().max() == 0
    # The switch of RoPE must matter here, and be on.
    assert model["rope.scaling.finetuned"] is True
    model.fields["rope.scaling.finetuned"] = False
    without_LV = torch.from_numpy(model.logits(IDS.numpy())).float()
    assert (without_LV[:, speech] - expected_LS).abs().max() > 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrices_have_the_dtype_and_small_tensors_are_float32(students, dtype, tmp_path):
    student = students["qwen2 per_kv_head, head with bias"]
    model = GraniteHybrid(write(tmp_path / "model.gguf", student, dtype))
    name = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    small = re.compile(r"norm|bias$|conv1d|ssm_a$|ssm_d$")
    assert set(model.types.values()) == {name, "F32"}
    for tensor, kind in model.types.items():
        assert kind == ("F32" if small.search(tensor) else name), tensor
    stored = model.tensors["blk.1.ffn_up.weight"]
    expected = student.state_dict()["body.layers.1.mlp.up_proj.weight"].to(dtype).double().numpy()
    np.testing.assert_array_equal(stored, expected)


REFUSED = {
    "pure Mamba": ({"layout": "MMMM"}, "layers of one kind only"),
    "pure attention": ({"layout": "AAAA"}, "layers of one kind only"),
    "norms of queries": ({"qk_norm": True}, "no norms of queries and keys"),
    "three times the width": ({"head_dim": 24}, "4 heads of width 24 do not divide"),
    "a bias behind the mixer": ({"o_bias": True}, "no bias in a mixer's output projection"),
    "YaRN": (
        {"rope_parameters": {**LLAMA3_ROPE, "rope_type": "yarn"}},
        "RoPE of type 'yarn' cannot be written",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_would_run_wrongly_is_refused(students, name, tmp_path):
    changes, message = REFUSED[name]
    config = students["qwen2 per_query_head"].config
    if "rope_parameters" in changes:
        yarn = {key: changes["rope_parameters"][key] for key in ("rope_type", "rope_theta", "factor")}
        changes = {"rope_parameters": {**yarn, "original_max_position_embeddings": 16}}
    if "layout" in changes:
        changes = {"layout": type(config.layout).from_string(changes["layout"])}
    assert gguf_obstacle(config) is None
    with pytest.raises(InputError, match=message):
        check_gguf_possible(dataclasses.replace(config, **changes))


def test_weights_beyond_float16_are_refused(students, tmp_path):
    student = students["qwen2 per_query_head"]
    weight = student.body.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        before = weight[0, 0].clone()
        weight[0, 0] = 70_000
        with pytest.raises(InputError, match=r"blk\.0\.ffn_up\.weight has values beyond float16"):
            write(tmp_path / "model.gguf", student, torch.float16)
        write(tmp_path / "model.gguf", student, torch.bfloat16)
        weight[0, 0] = before
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_the_package_is_named_where_it_is_missing(students, tmp_path, monkeypatch):
    real = builtins.__import__

    def no_gguf(name, *arguments):
        if name.partition(".")[0] == "gguf":
            raise ModuleNotFoundError("No module named 'gguf'", name="gguf")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", no_gguf)
    with pytest.raises(InputError, match=r"needs the package gguf: pip install 'mamtra-ray\[gguf\]'"):
        write(tmp_path / "model.gguf", students["qwen2 per_query_head"])


def export_gguf(place, folder, dtype=None):  # noqa: F811
    row = finalist_row("AMMA", ce=1.25, tokens=1000)
    return export.export_student(place.folder / "student", folder, row, place.teacher, place.source, "gguf", dtype)


@pytest.mark.parametrize("was_run", [False, True])
def test_an_export_says_whether_llama_cpp_ran_it(place, tmp_path, monkeypatch, was_run):  # noqa: F811
    found = ExportCheck(1.5e-3, 1e-3, {"llama-cpp-python": "9.9"}) if was_run else None
    monkeypatch.setattr(export, "check_gguf", lambda *_: found)
    assert export_gguf(place, tmp_path / "best", torch.float16) == found
    card, layout = (
        (tmp_path / "best" / "README.md").read_text(),
        json.loads((tmp_path / "best/layout.json").read_text()),
    )
    assert ("not run in llama.cpp when it was written" in card) == (not was_run)
    assert ("1.5e-03 (llama-cpp-python 9.9)" in card) == was_run
    assert layout["form"] == "gguf" and {"model.gguf", "generation_config.json", "README.md"} <= set(layout["files"])
    settings = json.loads((tmp_path / "best" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [VOCABULARY.speech_offset + stop_id for stop_id in VOCABULARY.stop_ids]
    assert len(settings["sequence_bias"]) == VOCABULARY.size - VOCABULARY.speech_size
    assert "library_name: llama.cpp" in card


def test_a_file_that_llama_cpp_does_not_run_is_not_exported(place, tmp_path, monkeypatch):  # noqa: F811
    """llama.cpp aborts the process that runs it; so does this stand-in."""
    stand_in = tmp_path / "stand_in"
    stand_in.mkdir()
    (stand_in / "llama_cpp.py").write_text("import os\nos.write(2, b'GGML_ASSERT(a == b) failed\\n')\nos.abort()\n")
    monkeypatch.setattr(llama_cpp_check.util, "find_spec", lambda _: object())
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(stand_in), *sys.path]))
    with pytest.raises(ExportCheckError, match=r"does not run .*model\.gguf, so it was not exported: GGML_ASSERT\(a"):
        export_gguf(place, tmp_path / "best")
    assert list(tmp_path.iterdir()) == [stand_in]


def test_dtype_belongs_to_gguf(capsys):
    assert main(["--run", "nowhere", "--layout", "AM", "--dtype", "float16"]) == 2
    assert "--dtype is for --format gguf" in capsys.readouterr().err


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_computes_and_says_the_same(students, shape, dtype, tmp_path):
    found = check_gguf(write(tmp_path / "model.gguf", students[shape], dtype), students[shape], SEQUENCE, dtype)
    assert found.relative_difference < {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}[dtype]
    assert "llama-cpp-python" in found.versions


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_llama_cpp_runs_the_demo_s_layout(dtype, tmp_path):
    teacher = load_teacher("demo", None)
    student = make_student(teacher.model, "AM" * (teacher.model.config.num_layers // 2)).eval()
    file = write(tmp_path / "model.gguf", student, dtype)
    found = check_gguf(file, student, teacher.sequence, dtype)
    assert found.relative_difference < {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}[dtype]


@needs_llama_cpp
@pytest.mark.slow
def test_llama_cpp_is_asked_whether_rope_is_on(students, tmp_path, monkeypatch):
    """A file with the switch off, as llama.cpp's own converter writes it, must not pass."""
    import gguf

    monkeypatch.setattr(gguf.GGUFWriter, "add_rope_scaling_finetuned", lambda writer, _: writer.add_bool(
        "granitehybrid.rope.scaling.finetuned", False))  # fmt: skip
    student = students["qwen2 per_query_head"]
    with pytest.raises(ExportCheckError, match=r"computes other logits in llama\.cpp"):
        check_gguf(write(tmp_path / "model.gguf", student), student, SEQUENCE, torch.float32)


@needs_llama_cpp
@pytest.mark.slow
def test_the_card_s_code_says_what_our_model_says(tmp_path):
    teacher_folder = write_folder(tmp_path / "teacher", transformers_model())
    teacher = load_teacher("huggingface", teacher_folder)
    student = make_student(teacher.model, "AMMA").eval()
    student.save(tmp_path / "student")
    source = TeacherConfig(kind="huggingface", path=str(teacher_folder))
    export.export_student(tmp_path / "student", tmp_path / "best", finalist_row("AMMA"), teacher, source, "gguf")
    [code] = re.findall(r"```python\n(.*?)```", (tmp_path / "best" / "README.md").read_text(), re.DOTALL)
    text = [3, 4, 5]
    code = code.replace("PATH", str(tmp_path / "best")).replace("[...]", str(text)) + "\nprint(speech)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (expected,) = generate(student, [SEQUENCE.prompt(text, (), ())], [(0, 60)])
    assert json.loads(run.stdout) == list(expected.tokens)


def test_the_verb_says_at_once_that_the_package_is_missing(monkeypatch, capsys, tmp_path):
    found = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name == "gguf" else found(name, *rest))
    assert main(["--run", str(tmp_path / "no_run"), "--layout", "AM", "--format", "gguf"]) == 2
    assert "--format gguf needs the package gguf, which is not installed: pip install" in capsys.readouterr().err
