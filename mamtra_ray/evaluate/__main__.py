"""Verb ``evaluate``: what a recognizer hears when teacher and students speak the test sentences."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mamtra_ray.config.command_line import verb_parser
from mamtra_ray.errors import InputError, exit_code_2_on_input_error
from mamtra_ray.run.names import DISTILLED_ROW, FINALISTS, best_folder, distilled_student
from mamtra_ray.run.open_run import open_run

if TYPE_CHECKING:
    from mamtra_ray.run.rows import FinalistRow


@exit_code_2_on_input_error
def main(arguments: list[str] | None = None) -> int:
    """Command line of the verb."""
    parser = verb_parser("evaluate", "What a recognizer hears when teacher and students speak the test sentences.")
    parser.add_argument(
        "--system",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="a saved model to hear beside the finalists of the run folder; may be repeated",
    )
    options = parser.parse_intermixed_args(arguments)
    run = open_run(options.space, options.run, options.overrides, creates=bool(options.system))
    config, folder = run.config, run.folder
    systems = systems_from_arguments(options.system, folder)
    if not config.evaluate.sentences:
        raise InputError("evaluate.sentences is 0: there is nothing to speak")

    from mamtra_ray.evaluate.evaluation import sentences_of, test_sentences, with_references

    sentences, without_words, _ = test_sentences(config)
    chosen = with_references(systems, sentences)
    print(f"{len(sentences)} sentences, {len(without_words)} left out without words; systems {', '.join(chosen)}")
    if options.dry_run:
        from mamtra_ray.evaluate.results import FOLDER
        from mamtra_ray.run.checks import check_inputs

        check_inputs(config, speech=True)
        spoken = sum(len(sentences_of(name, sentences)) for name in chosen)
        print(f"{spoken} utterances to speak and hear with {config.evaluate.recognizer}, into {folder / FOLDER}")
        return 0

    from mamtra_ray.evaluate.evaluation import comparison_lines, evaluate_systems, evaluation_alarms, result_table
    from mamtra_ray.evaluate.results import silent_systems
    from mamtra_ray.evaluate.run_scores import update_distilled, update_run
    from mamtra_ray.run.session import start_session

    session = start_session(run, ("evaluate",), options.address)
    with session.screen.phase("evaluate", f"{len(chosen)} systems x {len(sentences)} sentences"):
        evaluations = evaluate_systems(
            config,
            systems,
            folder,
            teacher=session.shared_teacher,
            worker=session.worker,
            on_progress=lambda done, total: session.screen.count(done, total, "utterances"),
            on_activity=session.screen.now,
        )
    print(f"\n{config.evaluate.recognizer} recognizer, {config.evaluate.normalization} normalization\n")
    print(result_table(evaluations))
    print("\n".join(["", *comparison_lines(evaluations)]).rstrip())
    if alarms := evaluation_alarms(evaluations):
        print("\n".join(["", *[f"alarm: {alarm.system} {alarm.text}" for alarm in alarms]]))
    if (best := update_run(folder, evaluations, config.search.ratios)) is not None:
        print(f"\nwritten into {folder / FINALISTS}; a new report: python -m mamtra_ray.report --run {folder}")
        print("\n".join(overtaken(folder, best)) or "what is exported is still the best of its ratio")
    if update_distilled(folder, evaluations) is not None:
        print(f"\nwritten into {folder / DISTILLED_ROW}; beside other runs: python -m mamtra_ray.compare RUN {folder}")
    if silent := silent_systems(evaluations):
        name, reason = next(iter(silent.items()))
        raise InputError(f"no sentence of system {name!r} could be spoken: {reason}")
    return 0


def systems_from_arguments(given: Sequence[str], folder: Path) -> dict[str, Path | None]:
    """The finalists of the run, its distilled student, and ``--system``: rates that are compared are made together.

    Raises:
        InputError: an argument that is no NAME=FOLDER, a finalist's name for another model, or nothing to hear.
    """
    from mamtra_ray.run.distilled import distilled_system

    finalists = {student.parent.name: student for student in sorted(folder.glob("finalists/*/student"))}
    systems: dict[str, Path | None] = dict(finalists)
    if (distilled := distilled_system(folder)) is not None:
        systems[distilled] = distilled_student(folder)
    for text in given:
        name, separator, path = text.partition("=")
        if not separator:
            raise InputError(f"--system is NAME=FOLDER, such as found=runs/demo/finalists/AMAM/student, not {text!r}")
        if (own := systems.get(name)) is not None and Path(path).resolve() != own.resolve():
            what = "a finalist" if name in finalists else "the student"
            raise InputError(f"--system {text}: {name} is {what} of {folder}; give the model another name")
        systems[name] = Path(path)
    if not systems:
        raise InputError(f"{folder} has no student to hear: run search or distill first, or give --system NAME=FOLDER")
    return systems


def overtaken(folder: Path, best: Mapping[str, FinalistRow]) -> list[str]:
    """What to do where these scores choose another finalist of a ratio than the exported one."""
    from mamtra_ray.run.folder import exported_layout

    lines = []
    for ratio, row in best.items():
        checkpoint = best_folder(folder, ratio, list(best))
        exported = exported_layout(checkpoint)
        if exported is not None and exported != row.layout:
            lines.append(f"{checkpoint} holds {exported}; by these scores {row.layout} is the better one:")
            lines.append(f"python -m mamtra_ray.export --run {folder} --layout {row.layout}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
