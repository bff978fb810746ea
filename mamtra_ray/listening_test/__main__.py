"""Verb ``listening_test``: a page for a mean opinion score test, and its statistics."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from mamtra_ray.config import load_config
from mamtra_ray.errors import InputError, exit_code_2_on_input_error


@exit_code_2_on_input_error
def main(arguments: list[str] | None = None) -> int:
    """Command line of the verb."""
    parser = argparse.ArgumentParser(
        prog="python -m mamtra_ray.listening_test",
        description="A blind test of naturalness made from runs, and its scores.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    make = verbs.add_parser("make", help="write the page, the webMUSHRA export and the key")
    make.add_argument("--run", type=Path, action="append", metavar="DIR", help="run folder; repeat it to compare runs")
    make.add_argument("--space", metavar="FILE_OR_NAME", help="whose runs/<name> is used without --run")
    make.add_argument(
        "--system", action="append", metavar="NAME", help="only these systems (default: teacher and best)"
    )
    make.add_argument("--utterances", type=int, help="how many to draw (default: all that every system spoke)")
    make.add_argument("--clips-per-listener", type=int, help="each listener rates a random part (default: all)")
    make.add_argument("--seed", type=int, default=0, help="of the drawing and the clips' names")
    make.add_argument("--output", type=Path, metavar="DIR", help="default: listening_test in the first run folder")
    make.add_argument("--dry-run", action="store_true", help="say what the test would hold, write nothing")
    make.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. name=other")
    score = verbs.add_parser("score", help="mean opinion scores from what came back")
    score.add_argument("folder", type=Path, help="folder of the test")
    score.add_argument("responses", type=Path, nargs="*", help="JSON or lss.csv files (default: FOLDER/responses/*)")
    score.add_argument("--json", action="store_true", help="the scores as JSON instead of a table")
    options = parser.parse_args(arguments)
    return _score(options) if options.verb == "score" else _make(options)


def _make(options: argparse.Namespace) -> int:
    from mamtra_ray.listening_test.opinion_scores import KEY
    from mamtra_ray.listening_test.page import RESPONSES, check_test_folder, choose_stimuli, make_test
    from mamtra_ray.run.folder import read_runs

    for name in ("utterances", "clips_per_listener"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be positive, not {value}")
    folders = options.run or [Path("runs") / load_config(options.space, options.overrides).name]
    stimuli = choose_stimuli(read_runs(folders), options.system, options.utterances, options.seed)
    systems = dict.fromkeys(stimulus.system for stimulus in stimuli)
    print(f"{len(stimuli)} clips: {len(stimuli) // len(systems)} utterances by {', '.join(systems)}")
    output = options.output or folders[0] / "listening_test"
    if options.dry_run:
        check_test_folder(stimuli, output)
        return 0
    make_test(stimuli, output, clips_per_listener=options.clips_per_listener)
    print(f"page for listeners  {output / 'test.html'}  (send it; they send back the file it saves)")
    print(f"for webMUSHRA       {output / 'webmushra'}  (copy its configs folder into a webMUSHRA checkout)")
    print(f"key                 {output / KEY}  (keep it to yourself)")
    print(f"put what comes back into {output / RESPONSES}, then: python -m mamtra_ray.listening_test score {output}")
    return 0


def _score(options: argparse.Namespace) -> int:
    from mamtra_ray.listening_test.page import score_test, scores_table

    scores = score_test(options.folder, options.responses)
    print(json.dumps([asdict(score) for score in scores], indent=2) if options.json else scores_table(scores))
    return 0


if __name__ == "__main__":
    sys.exit(main())
