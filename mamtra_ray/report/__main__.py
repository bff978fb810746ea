"""Verb ``report``: tables, figures and audio of runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mamtra_ray.config import load_config
from mamtra_ray.errors import exit_code_2_on_input_error


@exit_code_2_on_input_error
def main(arguments: list[str] | None = None) -> int:
    """Command line of the verb."""
    parser = argparse.ArgumentParser(
        prog="python -m mamtra_ray.report",
        description="The paper's tables and figures for your own runs, beside the published numbers.",
    )
    parser.add_argument("--run", type=Path, action="append", metavar="DIR", help="run folder; may be repeated")
    parser.add_argument("--space", metavar="FILE_OR_NAME", help="whose runs/<name> is reported without --run")
    parser.add_argument("--output", type=Path, help="folder or .html file (default: the first run folder)")
    parser.add_argument("--listening-test", type=Path, metavar="DIR", help="a scored test, for the NMOS column")
    parser.add_argument("--dry-run", action="store_true", help="say which sections there would be, write nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. name=other")
    options = parser.parse_args(arguments)
    run_dirs = options.run or [Path("runs") / load_config(options.space, options.overrides).name]

    from mamtra_ray.listening_test.opinion_scores import read_scores
    from mamtra_ray.report.report import build_report, check_output, write_report
    from mamtra_ray.run.folder import read_runs

    if options.dry_run:
        scores = read_scores(options.listening_test) if options.listening_test else ()
        report = build_report(read_runs(run_dirs), scores)
        check_output(report, options.output or run_dirs[0])
        for section in report.sections:
            tables, figures = len(section.tables), len(section.figures)
            print(f"{section.title}: {section.missing or f'{tables} tables, {figures} figures'}")
        return 0
    print(write_report(run_dirs, options.output or run_dirs[0], options.listening_test))
    return 0


if __name__ == "__main__":
    sys.exit(main())
