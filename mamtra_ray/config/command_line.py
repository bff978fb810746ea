"""The arguments that verbs share."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any


def verb_parser(verb: str, description: str, *, ray: bool = True) -> argparse.ArgumentParser:
    """A parser with ``--space``, ``--run``, ``--dry-run`` and overrides, and ``--address`` for verbs that use ``ray``.

    Parse with ``parse_intermixed_args``, so that overrides may stand anywhere.
    """
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
        add_address(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as search.trials=40")
    return parser


def add_address(parser: argparse.ArgumentParser) -> None:
    """The option ``--address``. Call it, and parse, before Ray is imported."""
    # A thread that outlives a stopped run must not start another cluster by calling Ray.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    if not os.environ.get("RAY_ADDRESS"):
        _keep_to_this_machine()
    parser.add_argument("--address", action=_Address, help="Ray cluster (default: $RAY_ADDRESS, else a new local one)")


class _Address(argparse.Action):
    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, values)
        if values == "local":
            _keep_to_this_machine()
        else:
            os.environ.pop(_CAN_REACH_OTHERS, None)


_CAN_REACH_OTHERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


def _keep_to_this_machine() -> None:
    """A local cluster's processes then listen on the loopback interface only; Ray reads this when it is imported.

    It is Ray's default where Ray has no clusters of several machines (Windows, macOS); elsewhere it listens everywhere.
    """
    os.environ.setdefault(_CAN_REACH_OTHERS, "0")
