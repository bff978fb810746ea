"""Verb ``export``: write a finalist as a checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mamtra_ray.errors import InputError, exit_code_2_on_input_error
from mamtra_ray.layouts import Layout
from mamtra_ray.run.names import FINALISTS, distilled_student, student_folder

if TYPE_CHECKING:
    from mamtra_ray.run.folder import Run
    from mamtra_ray.run.rows import FinalistRow

DTYPES = ("float32", "float16", "bfloat16")


@exit_code_2_on_input_error
def main(arguments: list[str] | None = None) -> int:
    """Command line of the verb."""
    parser = argparse.ArgumentParser(
        prog="python -m mamtra_ray.export",
        description="A distilled student as a Hugging Face checkpoint with a model card.",
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="folder of a search, or of distill")
    parser.add_argument("--layout", help="a finalist's layout, such as AMAM... (default: the student of distill)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: RUN/export/LAYOUT (LAYOUT.gguf)")
    parser.add_argument(
        "--format",
        choices=("transformers", "native", "cosyvoice2", "gguf"),
        default="transformers",
        help="native: for this project's SpeechLM.load alone; cosyvoice2: a folder for CosyVoice's own code, with the "
        "teacher's other files linked into it; gguf: a file for llama.cpp (docs/engines.md)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the matrices in a GGUF file; default: the student's own")
    options = parser.parse_args(arguments)
    if options.dtype and options.format != "gguf":
        raise InputError(f"--dtype is for --format gguf: {options.format} keeps the student's own")
    if options.format == "gguf" and importlib.util.find_spec("gguf") is None:
        raise InputError("--format gguf needs the package gguf, which is not installed: pip install 'mamtra-ray[gguf]'")
    wanted = Layout.from_string(options.layout) if options.layout is not None else None

    from mamtra_ray.run.folder import read_run

    run = read_run(options.run)
    row, trained = exportable(run, wanted)
    layout, source = row.layout, run.config.teacher
    if options.format == "cosyvoice2" and (source.kind != "cosyvoice2" or source.path is None):
        raise InputError(f"--format cosyvoice2: the teacher of {options.run} is {source.kind!r}")
    name = f"{layout}.gguf" if options.format == "gguf" else str(layout)
    output = options.output or options.run / "export" / name

    import torch

    from mamtra_ray.export.checkpoint import export_student
    from mamtra_ray.export.llama_cpp_check import PACKAGE
    from mamtra_ray.models.granite import check_representable
    from mamtra_ray.models.granite_gguf import check_gguf_possible
    from mamtra_ray.runtime.progress import said_while
    from mamtra_ray.speech_lm.generation_check import check_generation
    from mamtra_ray.speech_lm.speech_lm import SpeechLM
    from mamtra_ray.teachers import load_teacher
    from mamtra_ray.teachers.cosyvoice2 import write_folder

    with said_while("loading the teacher"):
        teacher = load_teacher(source.kind, source.path)
    if options.format == "transformers":
        check_representable(teacher.model.config)
    if options.format == "gguf":
        check_gguf_possible(dataclasses.replace(teacher.model.config, layout=layout))
    if options.format == "cosyvoice2":
        with said_while("checking that the student generates what it computes, writing it"):
            student = SpeechLM.load(trained).eval()
            check_generation(student, teacher.sequence, f"student {layout}")
            write_folder(student, Path(source.path or ""), output)
    else:
        dtype = getattr(torch, options.dtype) if options.dtype else None
        with said_while("writing the checkpoint, comparing it with the student"):
            check = export_student(trained, output, row, teacher, source, options.format, dtype)
        if options.format == "gguf" and check is None:
            print(f"not run in llama.cpp: {PACKAGE} is not installed", file=sys.stderr)
    print(output)
    if row.alarm:
        print(f"alarm: {layout} {row.alarm}", file=sys.stderr)
    return 0


def exportable(run: Run, layout: Layout | None) -> tuple[FinalistRow, Path]:
    """Scores and folder of the finalist of ``layout``, or of the run's distilled student.

    Raises:
        InputError: the run has no such student, or has no scores of it.
    """
    from mamtra_ray.run.distilled import distilled_layout, read_distilled

    rows = {row.layout: row for row in run.finalists}
    if layout is not None and layout in rows:
        return rows[layout], student_folder(run.path, layout)
    distilled = distilled_layout(run.path)
    if distilled is None or layout not in (None, distilled):
        known = ", ".join(map(str, rows)) or "none yet"
        if layout is None:
            raise InputError(f"{run.path} has no student of distill: give --layout (finalists: {known})")
        raise InputError(f"{layout} is no finalist of {run.path} (finalists in {FINALISTS}: {known})")
    if (row := read_distilled(run.path)) is None:
        raise InputError(
            f"{distilled_student(run.path)} has no scores beside it; this writes them, from its last checkpoint: "
            f"python -m mamtra_ray.distill --run {run.path} --layout {distilled}"
        )
    return row, distilled_student(run.path)


if __name__ == "__main__":
    sys.exit(main())
