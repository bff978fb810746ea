"""The demo teacher: a small Qwen2 that speaks household commands in one voice. Works offline, on a CPU.

``python -m mamtra_ray.teachers.demo`` builds it, its corpus and its codec from nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mamtra_ray.assets import demo_asset
from mamtra_ray.errors import exit_code_2_on_input_error
from mamtra_ray.teachers.demo_grammar import detokenize_text, tokenize_text

if TYPE_CHECKING:
    import torch

    from mamtra_ray.teachers.base import Teacher

__all__ = ["detokenize_text", "load", "main", "tokenize_text"]


def load(path: Path | None = None, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Teacher:
    """The demo teacher.

    Args:
        path: its folder (a Qwen2 checkpoint and ``speech_lm.json``); none for the packaged one, which is
            checked against the package's manifest first.
        dtype: of the parameters; float32 if None.
        device: where to put it.

    Raises:
        InputError: a file is missing or damaged.
    """
    import torch

    from mamtra_ray.teachers import huggingface

    folder = demo_asset("teacher") if path is None else Path(path)
    teacher = huggingface.load(folder, dtype or torch.float32, device)
    return dataclasses.replace(teacher, name="demo")


@exit_code_2_on_input_error
def main(arguments: Sequence[str] | None = None) -> int:
    """Build the demo assets."""
    parser = argparse.ArgumentParser(
        prog="python -m mamtra_ray.teachers.demo",
        description="Build the demo's corpus, codec and teacher from nothing. A stopped build goes on "
        "where it stood when it is given the same work folder.",
    )
    parser.add_argument("--output", type=Path, default=Path("demo_assets"), metavar="DIR", help="the finished assets")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="stages in between (default: OUTPUT with -work appended)"
    )
    parser.add_argument(
        "--scale", choices=("full", "tiny"), default="full", help="tiny runs every stage and makes nothing of use"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that synthesise speech")
    parser.add_argument("--dry-run", action="store_true", help="print the stages, what is there and what it costs")
    options = parser.parse_args(arguments)

    # The build needs the voice, the recogniser and this module's sisters; loading a teacher needs none of them.
    from mamtra_ray.teachers import demo_build, demo_stages, demo_voice

    work = options.work or options.output.with_name(options.output.name + "-work")
    settings = demo_build.SCALES[options.scale]
    if options.dry_run:
        print(demo_stages.plan(work))
        return 0
    demo_stages.build_all(
        settings,
        work,
        options.output,
        demo_voice.VOICE_NAME,
        demo_voice.load_voice,
        demo_voice.load_word_timer,
        options.jobs,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
