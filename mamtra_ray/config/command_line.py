"""The arguments that verbs share."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def verb_parser(verb: str, description: str, *, ray: bool = True) -> argparse.ArgumentParser:
    """A parser with ``--space``, ``--run``, ``--dry-run`` and overrides, and ``--address`` for verbs that use ``ray``.

    Parse with ``parse_intermixed_args``, so that overrides may stand anywhere.
    """
    # Before Ray is imported: a thread that outlives a stopped run must not start another cluster by calling Ray.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    parser = argparse.ArgumentParser(prog=f"python -m mamtra_ray.{verb}", description=description)
    parser.add_argument(
        "--space",
        metavar="FILE_OR_NAME",
        help="settings of a new run: a .yaml file or a shipped one (default: demo)",
    )
    parser.add_argument(
        "--run",
        type=Path,
        metavar="DIR",
        help="run folder (default: runs/<name>); a run in it keeps its settings",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, do nothing")
    if ray:
        parser.add_argument("--address", help="Ray cluster (default: $RAY_ADDRESS, else a new local one)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as search.trials=40")
    return parser
