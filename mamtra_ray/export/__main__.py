"""Verb ``export``: write a finalist as a checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mamtra_ray.errors import InputError, exit_code_2_on_input_error
from mamtra_ray.layouts import Layout
from mamtra_ray.run.names import FINALISTS, student_folder


@exit_code_2_on_input_error
def main(arguments: list[str] | None = None) -> int:
    """Command line of the verb."""
    parser = argparse.ArgumentParser(
        prog="python -m mamtra_ray.export",
        description="A distilled student as a Hugging Face checkpoint with a model card.",
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="folder of a search")
    parser.add_argument("--layout", required=True, help="a finalist's layout, such as AMAM...")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: RUN/export/LAYOUT")
    parser.add_argument(
        "--format",
        choices=("transformers", "native", "cosyvoice2"),
        default="transformers",
        help="native: for this project's SpeechLM.load alone; cosyvoice2: a folder for CosyVoice's own code, with the "
        "teacher's other files linked into it",
    )
    options = parser.parse_args(arguments)
    layout = Layout.from_string(options.layout)

    from mamtra_ray.run.folder import read_run

    run = read_run(options.run)
    source, rows = run.config.teacher, {row.layout: row for row in run.finalists}
    if layout not in rows:
        known = ", ".join(map(str, rows)) or "none yet"
        raise InputError(f"{layout} is no finalist of {options.run} (finalists in {FINALISTS}: {known})")
    if options.format == "cosyvoice2" and (source.kind != "cosyvoice2" or source.path is None):
        raise InputError(f"--format cosyvoice2: the teacher of {options.run} is {source.kind!r}")
    output = options.output or options.run / "export" / str(layout)

    from mamtra_ray.export.checkpoint import export_student
    from mamtra_ray.models.granite import check_representable
    from mamtra_ray.runtime.progress import said_while
    from mamtra_ray.speech_lm.generation_check import check_generation
    from mamtra_ray.speech_lm.speech_lm import SpeechLM
    from mamtra_ray.teachers import load_teacher
    from mamtra_ray.teachers.cosyvoice2 import write_folder

    with said_while("loading the teacher"):
        teacher = load_teacher(source.kind, source.path)
    trained = student_folder(options.run, layout)
    if options.format == "transformers":
        check_representable(teacher.model.config)
    if options.format == "cosyvoice2":
        with said_while("checking that the student generates what it computes, writing it"):
            student = SpeechLM.load(trained).eval()
            check_generation(student, teacher.sequence, f"student {layout}")
            write_folder(student, Path(source.path or ""), output)
    else:
        with said_while("writing the checkpoint, comparing it with the student"):
            export_student(trained, output, rows[layout], teacher, source, options.format)
    print(output)
    if alarm := rows[layout].alarm:
        print(f"alarm: {layout} {alarm}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
