"""The demo search at 1:1 against every placement of the paper, distilled and heard the same way.

    python benchmarks/demo_search.py            about 20 minutes on 2 cores
    python benchmarks/demo_search.py --quick    the two default placements at 1:1, 20 sentences

Runs ``python -m mamtra_ray.search`` as a user does, in ``runs/benchmark_search`` (going on with what is there), prints
its outcome and writes benchmarks/results/demo_search.json.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from measurement import LONG_DEMO, is_found, write_result

from mamtra_ray.layouts import Layout
from mamtra_ray.run.folder import read_run
from mamtra_ray.runtime.progress import table
from mamtra_ray.speech.error_rate import ErrorRate

FULL = [
    *LONG_DEMO,
    "search.strategies=block_beginning,block_end,front,middle,back,sandwich",
    "search.trials=16",
    "evaluate.sentences=100",
]
QUICK = ["evaluate.sentences=20"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small run; nothing is written")
    parser.add_argument("--run", type=Path, default=Path("runs/benchmark_search"), help="run folder")
    options = parser.parse_args()
    overrides = QUICK if options.quick else FULL
    command = ["python", "-m", "mamtra_ray.search", "--run", str(options.run), *overrides]
    subprocess.run([sys.executable, *command[1:]], check=True)
    rows = outcome(options.run)
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    if not options.quick:
        phases = {name: phase["seconds"] for name, phase in read_run(options.run).phases.items()}
        write_result("demo_search", rows, command, phase_seconds=phases)


def outcome(folder: Path) -> list[dict[str, Any]]:
    """One row per system: the codec, the teacher, then every finalist by ratio and CE."""
    run = read_run(folder)
    reference = run.reference
    assert reference is not None
    teacher = Layout.all_attention(run.finalists[0].layout.num_layers)
    rows = [
        _row(None, "codec round trip", None, reference.codec.wer if reference.codec else None),
        _row(teacher, "teacher", reference.teacher_ce, reference.teacher.wer if reference.teacher else None),
    ]
    for finalist in sorted(run.finalists, key=lambda row: (-row.layout.num_attention, row.ce)):
        found = is_found(finalist.origin)
        origin = f"found ({finalist.origin})" if found else finalist.origin
        rows.append(_row(finalist.layout, origin, finalist.ce, finalist.wer))
    return rows


def _row(layout: Layout | None, origin: str, ce: float | None, wer: ErrorRate | None) -> dict[str, Any]:
    return {
        "ratio": layout.ratio if layout else "",
        "layout": str(layout or ""),
        "from": origin,
        "CE": "" if ce is None else f"{ce:.3f}",
        "WER %": f"{100 * wer.value:.1f} [{100 * wer.low:.1f}, {100 * wer.high:.1f}]" if wer else "",
    }


if __name__ == "__main__":
    main()
