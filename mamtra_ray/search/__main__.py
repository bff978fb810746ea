"""Verb ``search``: from a teacher and a corpus to the best hybrid of every ratio.

Exit codes: 0 a result that can be used; 2 input or an installation that cannot; 3 the run is complete and its report
written, but nothing it found can be used (:mod:`mamtra_ray.evaluate.verdict`); 130 and 143 stopped by Ctrl-C or
SIGTERM.
"""

from __future__ import annotations

import sys

from mamtra_ray.config import explain
from mamtra_ray.config.command_line import verb_parser
from mamtra_ray.errors import Stopped, exit_code_2_on_input_error, say_last, stop_behind
from mamtra_ray.run.open_run import open_run


@exit_code_2_on_input_error
def main(arguments: list[str] | None = None) -> int:
    """Command line of the verb."""
    parser = verb_parser("search", "From a teacher and a corpus to the best hybrid of every ratio.")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run, also with other settings")
    parser.add_argument("--explain", action="store_true", help="print every key of a search-space file and stop")
    options = parser.parse_intermixed_args(arguments)
    if options.explain:
        print(explain())
        return 0
    run = open_run(options.space, options.run, options.overrides, resume=options.resume)
    if run.config.search.loggers:
        from mamtra_ray.run.checks import check_loggers

        check_loggers(run.config)
    if options.dry_run:
        from mamtra_ray.run.checks import check_inputs
        from mamtra_ray.search.plan import print_plan

        inputs = check_inputs(run.config, speech=True)
        print_plan(run.config, run.folder, inputs, options.address)
        if inputs.teacher.decoder is not None:
            from mamtra_ray.export.checkpoint import export_note

            print(export_note(inputs.teacher.decoder), end="")
        return 0

    from mamtra_ray.search.pipeline import search

    try:
        return search(run, options.address)
    except (Stopped, SystemError) as error:
        stop = stop_behind(error)
        go_on = f"python -m mamtra_ray.search --resume --run {run.folder}"
        say_last(f"\nstopped by {stop}; go on with: {go_on}")
        return stop.exit_code


if __name__ == "__main__":
    sys.exit(main())
