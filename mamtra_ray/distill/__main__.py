"""Verb ``distill``: distill one layout."""

from __future__ import annotations

import sys
from pathlib import Path

from mamtra_ray.artifacts import read_json
from mamtra_ray.config.command_line import verb_parser
from mamtra_ray.errors import InputError, exit_code_2_on_input_error
from mamtra_ray.layouts import Layout, from_strategy
from mamtra_ray.run.names import CONFIG, DISTILLED, DISTILLED_ROW, distilled_student
from mamtra_ray.run.open_run import open_run


@exit_code_2_on_input_error
def main(arguments: list[str] | None = None) -> int:
    """Command line of the verb."""
    parser = verb_parser("distill", "Train one layout with Eq. 5 from the teacher cache, on Ray Train workers.")
    parser.add_argument("--layout", required=True, help="one letter per layer, such as AMAM...; or STRATEGY:RATIO")
    options = parser.parse_intermixed_args(arguments)
    run = open_run(options.space, options.run, options.overrides)
    config, folder = run.config, run.folder
    if ":" not in options.layout:
        Layout.from_string(options.layout)

    from mamtra_ray.run.checks import check_inputs
    from mamtra_ray.run.memory import Lengths, check_compiles, check_memory, machine_of, memory_table, training_memory

    inputs = check_inputs(config, speech=False)
    layout = layout_from_argument(options.layout, inputs.num_layers)
    check_no_other_layout(folder, layout)
    lengths = Lengths.of(inputs.train, inputs.teacher.sequence_overhead, config.corpus.train_tokens)
    memory = training_memory(config, inputs.architecture, lengths, [layout], "distill", config.distill.workers)
    check_memory([memory], machine_of(config, options.address))
    check_compiles(config, options.address)
    if options.dry_run:
        print(memory_table([memory]))
        print(f"distill {layout} ({layout.ratio}) with {config.distill.tokens:,} tokens into {folder / 'student'}")
        return 0

    from mamtra_ray.align.phase import make_library
    from mamtra_ray.distill.curves import TensorBoardCurves
    from mamtra_ray.distill.job import DistillJob, distill_data
    from mamtra_ray.distill.learning_rate import with_learning_rate
    from mamtra_ray.distill.progress import show_progress, start_progress
    from mamtra_ray.distill.workers import checkpoints_at, distill_on_workers
    from mamtra_ray.run.distilled import distilled_row, write_distilled
    from mamtra_ray.run.rows import is_worse_than_start
    from mamtra_ray.run.session import start_session
    from mamtra_ray.runtime.progress import repeatedly
    from mamtra_ray.teacher_cache.phase import make_cache

    is_auto = config.distill.learning_rate == "auto"
    phases = ("cache", "align", *(["learning rate"] if is_auto else []), "distill")
    session = start_session(run, phases, options.address)
    train, validation = make_cache(session)
    library = make_library(session, train, validation)
    data = distill_data(config, session.shared_teacher, train, validation, str(library) if library else None)
    job = DistillJob(
        layout=layout,
        settings=(with_learning_rate(session, data, layout) if is_auto else session).config.distill,
        student=config.student,
        data=data,
        report_at=checkpoints_at(config.distill.tokens, config.distill.checkpoint_every_tokens),
        seed=config.seed,
        progress=start_progress(),
    )
    workers, screen = config.distill.workers, session.screen
    # Scores of a student that is about to be replaced; the same command writes them again.
    (folder / DISTILLED_ROW).unlink(missing_ok=True)
    with (
        screen.phase("distill", f"{layout} on {workers} Ray Train workers"),
        repeatedly(lambda: show_progress(screen, job)),
    ):
        curves = TensorBoardCurves(folder.resolve(), layout)
        report = distill_on_workers(job, folder, workers=workers, worker=session.worker, callbacks=[curves])
    write_distilled(folder, distilled_row(layout, report, session.costs(layout)))
    print(
        f"held-out CE {report.ce:.4f} (from {report.ce_start:.4f}), KL {report.kl:.4f} (from {report.kl_start:.4f}); "
        f"student in {folder / 'student'}"
    )
    if is_worse_than_start(report):
        print("warning: the student is worse than before its training; a lower distill.learning_rate should train it")
    print("\n".join(what_next(folder, config.teacher.speaks)))
    return 0


def what_next(folder: Path, speaks: bool) -> list[str]:
    """What can be done with the student, as with a finalist."""
    to_hear = [
        f'hear it:     python -m mamtra_ray.speak --student {distilled_student(folder)} --compare "SOME TEXT"',
        f"evaluate it: python -m mamtra_ray.evaluate --run {folder}",
        f"compare it:  python -m mamtra_ray.compare {folder} OTHER_RUN   (both evaluated on the same sentences)",
    ]
    return ["", *(to_hear if speaks else []), f"export it:   python -m mamtra_ray.export --run {folder}"]


def check_no_other_layout(folder: Path, layout: Layout) -> None:
    """Refuse a run that holds the distillation of another layout: its student and its checkpoints are in the way.

    Raises:
        InputError: says which one, and how to distill this one beside it.
    """
    for path in sorted(folder.glob(DISTILLED)):
        found = read_json(path).get("made_by", {}).get("layout")
        if found != str(layout):
            raise InputError(
                f"{folder} holds the distillation of {found}, and a run has room for one; beside it: "
                f"python -m mamtra_ray.distill --space {folder / CONFIG} --run {folder}-{layout} --layout {layout}"
            )


def layout_from_argument(text: str, num_layers: int) -> Layout:
    """``AMAM`` or ``block_beginning:1:3`` as a layout of ``num_layers``.

    Raises:
        InputError: neither form, or another number of layers.
    """
    strategy, separator, ratio = text.partition(":")
    if separator:
        return from_strategy(strategy, num_layers, ratio)
    layout = Layout.from_string(text)
    if layout.num_layers != num_layers:
        raise InputError(f"layout {text} has {layout.num_layers} layers, the teacher {num_layers}")
    return layout


if __name__ == "__main__":
    sys.exit(main())
