"""Verb ``probe``: score layouts by forward passes, and name the best of every ratio."""

from __future__ import annotations

import sys

from mamtra_ray.config.command_line import verb_parser
from mamtra_ray.errors import InputError, exit_code_2_on_input_error
from mamtra_ray.run.names import PROBE
from mamtra_ray.run.open_run import open_run


@exit_code_2_on_input_error
def main(arguments: list[str] | None = None) -> int:
    """Command line of the verb."""
    parser = verb_parser("probe", "Score hundreds of layouts by forward passes, and find the best of every ratio.")
    options = parser.parse_intermixed_args(arguments)
    run = open_run(options.space, options.run, options.overrides)
    config = run.config
    if config.student.initialization != "aligned":
        raise InputError(f"student.initialization is {config.student.initialization}: probing needs aligned mixers")
    if config.probe.num_layouts == 0:
        raise InputError("probe.num_layouts is 0: there is nothing to score")
    if options.dry_run:
        from mamtra_ray.run.checks import check_inputs

        check_inputs(config, speech=False)
        tokens = f"{config.probe.validation_tokens:,} tokens"
        print(f"probe: {config.probe.num_layouts} layouts on {tokens}, into {run.folder / PROBE}")
        return 0

    from mamtra_ray.align.phase import make_library
    from mamtra_ray.probe.phase import run_probe
    from mamtra_ray.probe.probing import propose
    from mamtra_ray.run.session import start_session
    from mamtra_ray.runtime.progress import table
    from mamtra_ray.teacher_cache.phase import make_cache

    session = start_session(run, ("cache", "align", "probe"), options.address)
    train, validation = make_cache(session)
    library = make_library(session, train, validation)
    assert library is not None
    rows = run_probe(session, library, validation)
    found = {row.layout: row for row in rows}
    best = []
    for ratio in config.search.ratios:
        for layout in propose(session.space, rows, ratio, 5):
            row = found.get(layout)
            best.append([ratio, layout, *([f"{row.ce:.3f}", f"{row.kl:.3f}"] if row else ["", "predicted"])])
    print()
    print(table(["ratio", "layout", "CE", "KL"], best))
    return 0


if __name__ == "__main__":
    sys.exit(main())
