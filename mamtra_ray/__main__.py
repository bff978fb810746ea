"""``python -m mamtra_ray VERB``, and the console script ``mamtra``: the verbs, and how to run one."""

from __future__ import annotations

import runpy
import sys

from mamtra_ray import __version__
from mamtra_ray.errors import nearest_name

VERBS = {
    "search": "the whole search: cache, align, probe, trials, finalists, speech, export, report",
    "corpus": "prepare a corpus: LibriTTS, Seed-TTS-eval, CosyVoice shards -> Parquet",
    "teacher_cache": "compute the teacher's outputs once",
    "align": "train one Mamba mixer per layer to its attention",
    "probe": "score layouts by forward passes",
    "tradeoff": "the best layout under a cost bound or a weight on the cost, from the probe's scores",
    "distill": "distill one layout",
    "evaluate": "WER, CER and more of generated speech",
    "compare": "students of several runs side by side, with paired tests over the same sentences",
    "speak": "say a text with the teacher, a run's best layout or any student",
    "export": "write a finalist as a Hugging Face checkpoint",
    "report": "tables, figures and audio of runs",
    "efficiency": "parameters, FLOPs and cache bytes in closed form",
    "listening_test": "a page for a mean opinion score test, and its statistics",
    "demo_assets": "rebuild the demo's corpus, codec and teacher",
}


def main() -> int:
    """Run the verb that is named first; without one, list them."""
    verb, *arguments = sys.argv[1:] or ["--help"]
    if verb in ("--help", "-h"):
        print("mamtra VERB --help, or python -m mamtra_ray.VERB --help\n")
        for name, what in VERBS.items():
            print(f"  {name:15} {what}")
        return 0
    if verb == "--version":
        print(f"mamtra_ray {__version__}")
        return 0
    if verb not in VERBS:
        print(f"error: unknown verb {verb!r}: {nearest_name(verb, VERBS)}", file=sys.stderr)
        return 2
    sys.argv = [f"mamtra {verb}", *arguments]
    runpy.run_module(f"mamtra_ray.{verb}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
