"""Verb ``demo_assets``: build the demo's corpus, codec and teacher from nothing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mamtra_ray.errors import exit_code_2_on_input_error


@exit_code_2_on_input_error
def main(arguments: Sequence[str] | None = None) -> int:
    """Build the demo assets."""
    parser = argparse.ArgumentParser(
        prog="python -m mamtra_ray.demo_assets",
        description="Build the demo's corpus, codec and teacher from nothing. A stopped build goes on "
        "where it stood when it is given the same work folder.",
    )
    parser.add_argument(
        "--teacher",
        choices=("demo", "demo24"),
        default="demo",
        help="demo24: 24 layers for sentences of up to 62 words, grown from the packaged demo's teacher",
    )
    parser.add_argument("--output", type=Path, default=Path("demo_assets"), metavar="DIR", help="the finished assets")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="stages in between (default: OUTPUT with -work appended)"
    )
    parser.add_argument(
        "--scale", choices=("full", "tiny"), default="full", help="tiny runs every stage and makes nothing of use"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that synthesize speech")
    parser.add_argument("--dry-run", action="store_true", help="print the stages, what is there and what it costs")
    options = parser.parse_args(arguments)

    # The build needs the voice, the recognizer and torch; --help needs none of them.
    from mamtra_ray.demo_assets import build, deep_stages, stages, voice

    work = options.work or options.output.with_name(options.output.name + "-work")
    stages.check_folders(work, options.output)
    deep = options.teacher == "demo24"
    if options.dry_run:
        print((deep_stages if deep else stages).plan(work))
        return 0
    making = (work, options.output, voice.VOICE_NAME, voice.load_voice, voice.load_word_timer, options.jobs)
    if deep:
        deep_stages.build_deep(deep_stages.SCALES[options.scale], *making)
    else:
        stages.build_all(build.SCALES[options.scale], *making)
    return 0


if __name__ == "__main__":
    sys.exit(main())
