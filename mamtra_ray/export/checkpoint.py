"""A distilled student as a checkpoint with a model card: for plain transformers, for llama.cpp, or in our own form."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import Literal

import torch

from mamtra_ray import __version__
from mamtra_ray.artifacts import file_hash, read_manifest, write_checked_json, write_text
from mamtra_ray.config import TeacherConfig
from mamtra_ray.errors import InputError
from mamtra_ray.export.card import model_card
from mamtra_ray.export.check import ExportCheck, check_export
from mamtra_ray.export.engines import write_vllm_processor
from mamtra_ray.export.llama_cpp_check import check_gguf
from mamtra_ray.models.decoder_config import DecoderConfig
from mamtra_ray.models.granite import obstacle, write_generation_config, write_granite
from mamtra_ray.models.granite_gguf import GGUF_FILE, write_granite_gguf
from mamtra_ray.run.names import EXPORTED_LAYOUT
from mamtra_ray.run.rows import FinalistRow, columns
from mamtra_ray.speech_lm.generation_check import check_generation
from mamtra_ray.speech_lm.speech_lm import SpeechLM
from mamtra_ray.teachers.teacher import Teacher
from mamtra_ray.teachers.text import save_text_tokenizer

Form = Literal["transformers", "native", "gguf"]


def form_of(config: DecoderConfig) -> Form:
    """What a search exports hybrids of this shape as: for plain transformers, wherever that can represent them."""
    return "transformers" if obstacle(config) is None else "native"


def export_note(config: DecoderConfig) -> str:
    """A line that says, before a search, that its checkpoints are for this project only; empty if they are not."""
    problem = obstacle(config)
    return f"export: this project's own form, which plain transformers does not load: {problem}\n" if problem else ""


def export_student(
    student_folder: Path,
    folder: Path,
    row: FinalistRow,
    teacher: Teacher,
    source: TeacherConfig,
    form: Form = "transformers",
    dtype: torch.dtype | None = None,
) -> ExportCheck | None:
    """Write the student as a checkpoint with tokenizer, layout and card.

    The form ``transformers`` is a GraniteMoeHybrid that plain transformers loads; what was written is loaded so, and
    compared with the student, first. ``gguf`` is a file for llama.cpp, which is run so where it is installed.
    ``native`` is what ``SpeechLM.load`` reads. The folder is replaced as a whole
    after that, so it never mixes two students, and keeps the old one where a check fails.

    Args:
        student_folder: what ``SpeechLM.save`` wrote.
        folder: the checkpoint's folder.
        row: the student's row of the finalists table.
        teacher: what it was distilled from.
        source: where the teacher came from, and with it the text tokenizer.
        form: of the weights.
        dtype: of a GGUF file's matrices; None: the student's.

    Returns:
        What the other library computed; None if none was asked.

    Raises:
        GenerationCheckError, NonFiniteLogitsError: the student does not generate what it computes.
        ExportCheckError: plain transformers, or llama.cpp, computes something else from the written files.
        InputError: ``folder`` holds something else than an unchanged export; or the form cannot represent it.
    """
    check_replaceable(folder)
    student = SpeechLM.load(student_folder).eval()
    check_generation(student, teacher.sequence, f"student {student.layout}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        new.chmod(0o755)
        check = None
        weights = (student.config, student.state_dict(), dataclasses.asdict(student.vocabulary))
        if form == "native":
            student.save(new)
        elif form == "gguf":
            dtype = dtype or student.dtype
            write_granite_gguf(new / GGUF_FILE, *weights, dtype, f"{teacher.name} {student.layout}")
            write_generation_config(new, *weights)
            check = check_gguf(new / GGUF_FILE, student, teacher.sequence, dtype)
        else:
            write_granite(new, *weights)
            write_vllm_processor(new)
            check = check_export(new, student, teacher.sequence)
        has_tokenizer = save_text_tokenizer(source.kind, Path(source.path) if source.path else None, new)
        write_text(new / "README.md", model_card(student, row, teacher, source.kind, has_tokenizer, check, form))
        scores = columns(row)
        write_checked_json(
            new / EXPORTED_LAYOUT,
            {
                "kind": "layout",
                "schema_version": 1,
                "layout": str(student.layout),
                "attention_layers": student.layout.attention_layers,
                "ratio": student.layout.ratio,
                "teacher": {"name": teacher.name, "fingerprint": teacher.fingerprint},
                "sequence": {"prefix": teacher.sequence.prefix, "separator": teacher.sequence.separator},
                "scores": {name: scores[name] for name in ("ce", "kl", "wer", "wer_low", "wer_high", "cer", "tokens")},
                "mamtra_ray": __version__,
                "alarm": row.alarm,
                "form": form,
                "check": None if check is None else dataclasses.asdict(check),
                "files": {name: file_hash(new / name) for name in _file_names(new)},
            },
        )
        check_replaceable(folder)
        if folder.exists():
            shutil.rmtree(folder)
        new.replace(folder)
        return check
    finally:
        shutil.rmtree(new, ignore_errors=True)


def check_replaceable(folder: Path) -> None:
    """Refuse a folder that an export would delete and that holds anything else than an export.

    Raises:
        InputError: names the file that is no part of an export, or was changed since it was written.
    """
    if not folder.is_symlink() and (not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))):
        return
    if folder.is_symlink() or not (folder / EXPORTED_LAYOUT).is_file():
        raise InputError(f"{folder} is there and holds no export (no {EXPORTED_LAYOUT}): give another --output")
    written = read_manifest(folder / EXPORTED_LAYOUT, "layout", 1).get("files", {})
    for name in _file_names(folder):
        if name != EXPORTED_LAYOUT and written.get(name) != file_hash(folder / name):
            raise InputError(
                f"{folder / name} would be deleted, but it is no part of the export there or was changed since: move "
                "it away, or give another --output"
            )


def _file_names(folder: Path) -> list[str]:
    """All files, relative to the folder; a link counts as a file.

    Not what Python compiled when vLLM imported the logits processor from there.
    """
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if (path.is_symlink() or path.is_file()) and path.parent.name != "__pycache__"
    )
