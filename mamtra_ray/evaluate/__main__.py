"""Verb ``evaluate``: what a recognizer hears when teacher and students speak the test sentences."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mamtra_ray.config.command_line import verb_parser
from mamtra_ray.errors import InputError, exit_code_2_on_input_error
from mamtra_ray.run.open_run import open_run


@exit_code_2_on_input_error
def main(arguments: list[str] | None = None) -> int:
    """Command line of the verb."""
    parser = verb_parser("evaluate", "What a recognizer hears when teacher and students speak the test sentences.")
    parser.add_argument(
        "--system",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="a saved model, may be repeated (default: the finalists of the run folder)",
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
        )
    print(f"\n{config.evaluate.recognizer} recognizer, {config.evaluate.normalization} normalization\n")
    print(result_table(evaluations))
    print("\n".join(["", *comparison_lines(evaluations)]).rstrip())
    if alarms := evaluation_alarms(evaluations):
        print("\n".join(["", *[f"alarm: {alarm.system} {alarm.text}" for alarm in alarms]]))
    if silent := silent_systems(evaluations):
        name, reason = next(iter(silent.items()))
        raise InputError(f"no sentence of system {name!r} could be spoken: {reason}")
    return 0


def systems_from_arguments(given: Sequence[str], folder: Path) -> dict[str, Path | None]:
    """``--system``, or the finalists of the run.

    Raises:
        InputError: an argument that is no NAME=FOLDER, or a run without finalists.
    """
    systems: dict[str, Path | None] = {}
    for text in given:
        name, separator, path = text.partition("=")
        if not separator:
            raise InputError(f"--system is NAME=FOLDER, such as found=runs/demo/finalists/AMAM/student, not {text!r}")
        systems[name] = Path(path)
    if given:
        return systems
    found = {student.parent.name: student for student in sorted(folder.glob("finalists/*/student"))}
    if not found:
        raise InputError(f"{folder} has no finalists to hear: run the search first, or give --system NAME=FOLDER")
    return dict(found)


if __name__ == "__main__":
    sys.exit(main())
