"""What the recognizer costs and hears when its encoder is given less than Whisper's 30 seconds.

    python benchmarks/recognition_window.py            150 sentences, about 6 CPU minutes
    python benchmarks/recognition_window.py --quick    6 sentences, nothing written

The codec speaks test sentences of the demo; each sound is heard in every window in turn, so that the windows share the
machine's load. Once as it is and once under white noise 10 dB below the speech, where a recognizer that only just hears
would fall first. CPU seconds of the process, one thread; ratios per sentence, with their quartiles.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from measurement import print_table, quartiles, write_result

from mamtra_ray.corpus.table import read_corpus
from mamtra_ray.speech.demo_codec import load_codec
from mamtra_ray.speech.recognizer import WHISPER_WINDOW_SECONDS, load_recognizer
from mamtra_ray.speech.wer import bootstrap_interval, paired_difference, word_error_rate

WINDOWS = (WHISPER_WINDOW_SECONDS, 20, 15, 12, 10)
LONGEST_SOUND = 8.5
"""Seconds that fit into every window, with the silence around them."""


def with_noise(sound: np.ndarray, decibels: float, seed: int) -> np.ndarray:
    """White noise so many decibels below the sound's power."""
    noise = np.random.default_rng(seed).normal(size=len(sound))
    level = np.sqrt(np.square(sound).mean() * 10 ** (-decibels / 10))
    return (sound + level * noise).clip(-1, 1).astype(np.float32)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=150)
    parser.add_argument("--quick", action="store_true", help="6 sentences, nothing is written")
    options = parser.parse_args()
    rows = read_corpus(None, "test").slice(0, 6 if options.quick else options.sentences).to_pylist()
    codec, full = load_codec(), load_recognizer()
    recognizers = {window: dataclasses.replace(full, window_seconds=window) for window in WINDOWS}
    sounds = [codec.decode(row["speech_tokens"]) for row in rows]
    kept = [index for index, sound in enumerate(sounds) if len(sound) < LONGEST_SOUND * 16_000]
    texts = [rows[index]["text"] for index in kept]
    results = []
    for condition in ("clean", "noise at 10 dB"):
        heard: dict[int, list[str]] = {window: [] for window in WINDOWS}
        seconds: dict[int, list[float]] = {window: [] for window in WINDOWS}
        for turn, index in enumerate(kept):
            sound = sounds[index] if condition == "clean" else with_noise(sounds[index], 10, index)
            first = turn % len(WINDOWS)
            for window in WINDOWS[first:] + WINDOWS[:first]:
                began = time.process_time()
                heard[window] += recognizers[window].transcribe([sound])
                seconds[window].append(time.process_time() - began)
        rates = {window: word_error_rate(texts, heard[window]) for window in WINDOWS}
        for window in WINDOWS:
            ratio = quartiles([own / base for own, base in zip(seconds[window], seconds[WINDOWS[0]], strict=True)])
            low, high = bootstrap_interval(rates[window].errors, rates[window].words)
            gap = paired_difference(rates[window], rates[WINDOWS[0]]).difference
            results.append(
                {
                    "sound": condition,
                    "window s": window,
                    "CPU s a sentence": round(float(np.mean(seconds[window])), 3),
                    "ratio": f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]",
                    "WER %": round(100 * rates[window].wer, 2),
                    "95 %": f"{100 * low:.2f} .. {100 * high:.2f}",
                    "WER - that of 30 s": f"{100 * gap.value:+.2f} [{100 * gap.low:+.2f}, {100 * gap.high:+.2f}]",
                }
            )
    print_table(results)
    if not options.quick:
        write_result("recognition_window", results, recognizer=full.name, sentences=len(kept))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
