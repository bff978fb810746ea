"""Is decoding with static shapes ever faster than with the growing cache on a CPU, where there are no CUDA graphs?

    python benchmarks/static_decoding.py            a few minutes on one core
    python benchmarks/static_decoding.py --quick    a few steps; nothing is written

The demo teacher's shape (12 layers of 128), and four layers of CosyVoice 2's; the teacher and a 1:1 student; greedy,
all rows to the end, from a cache already filled. Both ways run in turn, in an order that rotates; one thread, processor
time. The static way turns the filled cache into its own within the time, as it does after a prompt.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from generate import Stopwatch, filled_cache, ours
from measurement import paired, print_table, write_result
from random_models import random_teacher

from mamtra_ray.efficiency import ARCHITECTURES
from mamtra_ray.layouts import from_strategy
from mamtra_ray.speech_lm.speech_lm import SpeechLM
from mamtra_ray.speech_lm.student import make_student


def decoding(
    model: SpeechLM, architecture: str, static: bool, batch: int, context: int, tokens: int, clock: Stopwatch
) -> Callable[[], object]:
    contestant = ours(model, static)

    def run() -> None:
        with clock.paused():
            cache = filled_cache(contestant, ARCHITECTURES[architecture], batch, context, model.dtype)
        contestant.decode(cache, batch, context, tokens)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one context, 8 steps, 2 rounds")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=32, help="decoding steps of a round")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.tokens = 2, 8
    torch.set_num_threads(1)
    rows = []
    for architecture, layers, contexts in (("demo", 12, (64, 256)), ("cosyvoice2", 4, (256, 2048))):
        teacher = random_teacher(ARCHITECTURES[architecture], layers)
        student = make_student(teacher, from_strategy("block_beginning", layers, "1:1"), share_weights=True).eval()
        for context in contexts[:1] if options.quick else contexts:
            for batch in (1, 8):
                for name, model in (("teacher", teacher), ("1:1", student)):
                    clock = Stopwatch()
                    runs = {
                        way: decoding(model, architecture, way == "static", batch, context, options.tokens, clock)
                        for way in ("growing", "static")
                    }
                    timings = paired(runs, options.rounds, clock=clock)
                    static = timings["static"]
                    rows.append(
                        {
                            "shape": architecture,
                            "layers": layers,
                            "model": name,
                            "context": context,
                            "batch": batch,
                            "ms of a step, growing": round(1e3 * timings["growing"].median / options.tokens, 3),
                            "ms of a step, static": round(1e3 * static.median / options.tokens, 3),
                            "static over growing": round(static.ratio, 3),
                            "low": round(static.ratio_low, 3),
                            "high": round(static.ratio_high, 3),
                        }
                    )
                    print_table(rows[-1:])
    print_table(rows)
    if not options.quick:
        write_result("static_decoding", rows, settings=vars(options))


if __name__ == "__main__":
    main()
