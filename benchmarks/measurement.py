"""What every benchmark shares: the machine, timings taken side by side, tables, result files."""

from __future__ import annotations

import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mamtra_ray.artifacts import write_json
from mamtra_ray.runtime.progress import table

RESULTS = Path(__file__).parent / "results"
LONG_DEMO = [
    "align.tokens=150000",
    "corpus.validation_tokens=8000",
    "search.rung_tokens=10000,20000",
    "search.strategies=block_beginning,back",
    "distill.tokens=80000",
    "distill.checkpoint_every_tokens=40000",
    "evaluate.temperature=0",
]
"""The demo with budgets that leave less to chance than the few minutes of `make search`: what results here are of."""


@dataclass(frozen=True)
class Timing:
    """One function's times over all rounds, in seconds, and its time over the baseline's, round by round.

    Ratios are taken within a round, where both saw the same machine; ``low`` and ``high`` are the quartiles.
    """

    median: float
    low: float
    high: float
    ratio: float
    ratio_low: float
    ratio_high: float

    def ratio_text(self) -> str:
        return f"{self.ratio:.2f} [{self.ratio_low:.2f}, {self.ratio_high:.2f}]"


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, lower quartile, upper quartile)."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, low, high


def paired(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    baseline: str | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time functions side by side: each runs once in every round, in an order that rotates.

    ``baseline`` (default: the first) is the denominator of the ratios. Every function runs once before, untimed. On a
    shared machine ``clock=time.thread_time`` counts only the processor time of this thread.
    """
    names = list(functions)
    baseline = names[0] if baseline is None else baseline
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            began = clock()
            functions[name]()
            seconds[name].append(clock() - began)
    return {
        name: Timing(
            *quartiles(seconds[name]),
            *quartiles([own / base for own, base in zip(seconds[name], seconds[baseline], strict=True)]),
        )
        for name in names
    }


def machine() -> dict[str, Any]:
    """What a reader needs to judge a number: processor, memory, load, versions, commit."""
    cpu = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = models[0] if models else cpu
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return {
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or None,
    }


def is_found(origin: str) -> bool:
    """Whether a layout of this origin is the search's own."""
    return origin in ("probe", "optuna")


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as an aligned text table; what a row does not have stays empty."""
    if not rows:
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[row.get(name, "") for name in names] for row in rows]
    print(table(names, [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in cells]))


def write_result(
    name: str, rows: Sequence[Mapping[str, Any]], command: Sequence[str] | None = None, **more: Any
) -> Path:
    """Write ``benchmarks/results/<name>.json``: the rows, the command that made them (default: this one), the machine.

    ``more`` goes beside them, for what is said once (settings, conclusions).
    """
    command = ["python", *sys.argv] if command is None else command
    path = RESULTS / f"{name}.json"
    write_json(
        path,
        {
            "schema_version": 1,
            "command": shlex.join(command),
            "machine": machine(),
            **more,
            "rows": rows,
        },
    )
    print(f"wrote {path}")
    return path
