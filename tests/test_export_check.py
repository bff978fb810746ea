"""An export that plain transformers reads otherwise than we do is refused, and leaves the old one in its place."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from made_run import finalist_row
from safetensors.torch import load_file, save_file
from test_granite import CASES, make_exportable
from tiny_models import SEQUENCE, VOCABULARY, transformers_model, write_folder

from mamtra_ray.config import TeacherConfig
from mamtra_ray.export import check as export_check
from mamtra_ray.export import checkpoint as export
from mamtra_ray.export.check import ExportCheckError, check_export
from mamtra_ray.export.checkpoint import export_student
from mamtra_ray.speech.error_rate import ErrorRate
from mamtra_ray.speech_lm.generation_check import NonFiniteLogitsError
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.teachers import load_teacher

ROW = finalist_row("AMMA", ce=1.25, tokens=1000, wer=ErrorRate(0.1, 0.05, 0.2))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher, its configuration, and a saved student that no test changes."""
    folder = tmp_path_factory.mktemp("place")
    write_folder(folder / "teacher", transformers_model())
    teacher = load_teacher("huggingface", folder / "teacher")
    make_student(teacher.model, "AMMA").save(folder / "student")
    source = TeacherConfig(kind="huggingface", path=str(folder / "teacher"))
    return SimpleNamespace(folder=folder, teacher=teacher, source=source)


def exported(place, folder: Path, student: str = "student", **changes):
    export_student(place.folder / student, folder, dataclasses.replace(ROW, **changes), place.teacher, place.source)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sound_exports_pass(case, dtype, tmp_path):
    student = make_exportable(*CASES[case], tmp_path / "teacher").to(dtype)
    student.save_granite(tmp_path / "out")
    found = check_export(tmp_path / "out", student, SEQUENCE)
    assert found.relative_difference < 1e-5 and set(found.versions) >= {"torch", "transformers", "mamtra_ray"}


def test_card_and_layout_say_what_was_checked(place, tmp_path):
    exported(place, tmp_path / "best")
    content = json.loads((tmp_path / "best" / "layout.json").read_text())
    check, card = content["check"], (tmp_path / "best" / "README.md").read_text()
    assert 0 <= check["largest_difference"] < 1e-4 and f"{check['largest_difference']:.1e}" in card
    for name, version in check["versions"].items():
        assert f"{name} {version}" in card
    assert content["alarm"] is None and "do not use" not in card
    assert content["scores"]["ce"] == 1.25 and content["scores"]["wer_high"] == 0.2
    assert "- word error rate 10.00% (95 % interval 5.00% to 20.00%)" in card and "on 1,000 tokens" in card
    exported(place, tmp_path / "best", alarm="stops at once in 20 % of the sentences")
    assert "**do not use**: it stops at once in 20 %" in (tmp_path / "best" / "README.md").read_text()


def scaled(name: str, factor: float):
    """Multiplies one tensor of a written checkpoint, as a transformers that reads it otherwise would."""

    def alter(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors[name] = tensors[name] * factor
        save_file(tensors, path, metadata={"format": "pt"})

    return alter


def renamed(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.input_norm.weight"] = tensors.pop("model.layers.0.input_layernorm.weight")
    save_file(tensors, path, metadata={"format": "pt"})


def changed(file: str, key: str, value):
    def alter(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | {key: value}))

    return alter


ALTERATIONS = {
    "one convolution": (scaled("model.layers.1.mamba.conv1d.weight", 1.05), "other logits .* by up to"),
    "one attention": (scaled("model.layers.0.self_attn.q_proj.weight", 1.1), "other logits .* by up to"),
    "another epsilon": (changed("config.json", "rms_norm_eps", 1e-2), "other logits .* by up to"),
    "a tensor without a place": (renamed, r"does not fit plain transformers \(missing keys: .*input_layernorm"),
    "no restriction to speech": (
        changed("generation_config.json", "sequence_bias", [[[VOCABULARY.speech_offset + 3], 50.0]]),
        "other logits .* by up to",
    ),
    "text ids allowed and wanted": (
        changed(
            "generation_config.json",
            "sequence_bias",
            [[[token], 50.0 if token < 3 else -1e9] for token in range(VOCABULARY.speech_offset)],
        ),
        "in plain transformers says token -[0-9]+ where our model says",
    ),
    "other stop ids": (changed("generation_config.json", "eos_token_id", [3]), r"stops at the ids \[3\]"),
}


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_what_was_altered_after_writing_is_refused_and_the_old_export_stays(place, tmp_path, monkeypatch, alteration):
    best = tmp_path / "best"
    exported(place, best)
    before = {path.name: path.read_bytes() for path in best.iterdir()}
    alter, message = ALTERATIONS[alteration]
    sound = export.write_granite

    def write_and_alter(folder, *arguments):
        sound(folder, *arguments)
        alter(folder)

    monkeypatch.setattr(export, "write_granite", write_and_alter)
    with pytest.raises(ExportCheckError, match=message):
        exported(place, best, ce=9.0)
    assert {path.name: path.read_bytes() for path in best.iterdir()} == before
    assert list(tmp_path.iterdir()) == [best], "nothing half-made stays behind"


def test_another_token_at_a_near_tie_is_no_reason_to_refuse(place, tmp_path, monkeypatch):
    """Greedy speech may part where two scores differ by rounding; it may not where they do not."""
    student = make_student(place.teacher.model, "AMMA").eval()
    student.save_granite(tmp_path / "out")

    def second_best(model, prompts, bounds):
        """What our model would say if at token 5 it took the runner-up."""
        (said,) = sound(model, prompts, bounds)
        ids = torch.cat([prompts[0], torch.tensor(said.tokens[:5]) + VOCABULARY.speech_offset])
        scores = model(ids[None])[0, -1]
        scores[list(VOCABULARY.stop_ids)] = -torch.inf
        tokens = [*said.tokens[:5], int(scores.topk(2).indices[1]), *said.tokens[6:]]
        return [SimpleNamespace(tokens=tokens)]

    sound = export_check.generate
    monkeypatch.setattr(export_check, "generate", second_best)
    with torch.inference_mode(), pytest.raises(ExportCheckError, match=r"token 5 of a greedy continuation"):
        check_export(tmp_path / "out", student, SEQUENCE)
    monkeypatch.setattr(export_check, "tolerance", lambda *_: 10.0)
    check_export(tmp_path / "out", student, SEQUENCE)


def test_a_student_that_has_diverged_is_not_exported(place, tmp_path):
    student = make_student(place.teacher.model, "AMMA")
    with torch.no_grad():
        student.body.norm.weight[0] = torch.nan
    student.save(place.folder / "diverged")
    with pytest.raises(NonFiniteLogitsError, match=r"student AMMA .* not finite"):
        exported(place, tmp_path / "best", "diverged")
    assert not list(tmp_path.iterdir())
