"""Time and memory of the surrogate's exact minimum, by model size. One core.

    python benchmarks/exact_minimum.py            about two minutes
    python benchmarks/exact_minimum.py --quick    24 layers only, nothing written

Each function is a surrogate fitted to the scores of 300 random layouts, whose logarithm has layer terms, decaying pair
terms and noise. Up to 28 layers all layouts are enumerated (every budget at once); beyond that HiGHS proves single
budgets. Every row runs in a process of its own; its peak memory is that of the whole process, imports included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from measurement import print_table, write_result

from mamtra_ray.layouts.constraints import Constraints, layouts_to_matrix, sample_layouts
from mamtra_ray.surrogate.optimum import best_layouts
from mamtra_ray.surrogate.quadratic import Quadratic
from mamtra_ray.surrogate.surrogate import fit_surrogate

# (layers, fewest and most attention layers); one number of attention layers is one budget.
CASES = ((24, 0, 24), (28, 0, 28), (36, 18, 18), (36, 9, 9), (48, 24, 24), (48, 12, 12), (64, 32, 32), (64, 16, 16))


def measure(num_layers: int, fewest: int, most: int) -> dict[str, Any]:
    """One row; runs in this process."""
    rng = np.random.default_rng(num_layers)
    distance = np.abs(np.subtract.outer(np.arange(num_layers), np.arange(num_layers)))
    pairs = np.triu(rng.normal(size=distance.shape) * 0.1 * np.exp(-(distance - 1) / 2), 1)
    truth = Quadratic(-4.0, 0.15 + 0.1 * rng.normal(size=num_layers), pairs)
    layouts = sample_layouts(Constraints(num_layers), 300, rng)
    scores = truth(layouts_to_matrix(layouts, num_layers)) + 0.05 * rng.normal(size=len(layouts))
    began = time.process_time()
    surrogate = fit_surrogate(layouts, scores)
    fit_seconds = time.process_time() - began
    constraints = Constraints(num_layers, min_attention=fewest, max_attention=most)
    began = time.process_time()
    found = best_layouts(surrogate.mean, constraints, time_limit=60)
    seconds = time.process_time() - began
    return {
        "layers": num_layers,
        "attention layers": f"{fewest}" if fewest == most else f"{fewest} to {most}",
        "layouts": constraints.num_layouts,
        "fit CPU s": round(fit_seconds, 3),
        "optimum CPU s": round(seconds, 3),
        "largest gap": max(optima[0].gap for optima in found.values()),
        "peak MiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="24 layers only, nothing is written")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(measure(*CASES[options.case])))
        return 0
    rows = []
    for case in range(1 if options.quick else len(CASES)):
        command = [sys.executable, __file__, "--case", str(case)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    print_table(rows)
    if not options.quick:
        write_result("exact_minimum", rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
