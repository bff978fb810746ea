"""How much of a training's work is padding, with our batches and with the usual ones.

Lengths alone decide it, so no teacher runs. Two corpora: the packaged demo (its training split), and made-up lengths
as LibriTTS has them for CosyVoice 2 (25 speech tokens a second; log-normal, 5.6 s on average, 1 to 30 s), whose
cache is larger than one shuffling window. Batches hold at most so many padded tokens (the paper: 40,000).

    python benchmarks/padding.py            some seconds

"ours" is what every training here gets; "shuffled" takes utterances at random up to the same number of padded tokens;
"fixed count" is a DataLoader's: as many utterances a batch as ours on average, at random, padded to the longest.
"""

from __future__ import annotations

import argparse

import numpy as np
from measurement import print_table, write_result

from mamtra_ray.corpus.selection import drawn
from mamtra_ray.corpus.table import read_corpus, token_counts
from mamtra_ray.speech_lm.sequences import SequenceFormat, Vocabulary
from mamtra_ray.teacher_cache.batches import plan_epoch
from mamtra_ray.teacher_cache.manifest import CacheManifest
from mamtra_ray.teacher_cache.shared import WINDOW_BYTES, SharedCache

BLOCK_BYTES = 64 << 20
EPOCHS = 3


def libritts_like(utterances: int = 60_000) -> tuple[np.ndarray, np.ndarray]:
    """Text and speech tokens of every utterance."""
    random = np.random.default_rng(0)
    seconds = np.clip(random.lognormal(np.log(5.6) - 0.7**2 / 2, 0.7, utterances), 1, 30)
    return np.round(seconds * random.normal(3.5, 0.5, utterances).clip(2, 5)).astype(int), np.round(25 * seconds)


def shared_of(num_text: np.ndarray, num_speech: np.ndarray, bytes_per_position: int) -> SharedCache:
    """The lengths as a cache of blocks in corpus order; what it holds is never read."""
    size = (num_speech + 1) * bytes_per_position
    block_of_row = (np.cumsum(size) // BLOCK_BYTES).astype(np.int32)
    whole = size.sum() <= WINDOW_BYTES
    num_blocks = int(block_of_row[-1]) + 1
    return SharedCache(
        manifest=CacheManifest({}, 0, 1, True, {}),
        split="train",
        blocks=(None,) * num_blocks,
        block_of_row=block_of_row,
        row_in_block=np.zeros(len(num_text), np.int32),
        num_text=num_text.astype(np.int32),
        num_speech=num_speech.astype(np.int32),
        num_bytes=int(size.sum()),
        window_blocks=num_blocks if whole else WINDOW_BYTES // BLOCK_BYTES,
        quantizer=None,
    )


def waste(batches: list[np.ndarray], lengths: np.ndarray) -> float:
    """Share of padding, in percent."""
    padded = sum(len(rows) * int(lengths[rows].max()) for rows in batches)
    return 100 * (1 - sum(int(lengths[rows].sum()) for rows in batches) / padded)


def shuffled(lengths: np.ndarray, tokens_per_batch: int, seed: int) -> list[np.ndarray]:
    batches: list[list[int]] = [[]]
    longest = 0
    for row in np.random.default_rng(seed).permutation(len(lengths)).tolist():
        longest = max(longest, int(lengths[row]))
        if batches[-1] and longest * (len(batches[-1]) + 1) > tokens_per_batch:
            batches.append([])
            longest = int(lengths[row])
        batches[-1].append(row)
    return [np.array(rows) for rows in batches]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sequence = SequenceFormat(prefix=(20,), separator=(21,), vocabulary=Vocabulary(10, 10, 2, eos_id=9, stop_ids=(9,)))
    demo = drawn(read_corpus(None, "train"), 0, 160_000)
    corpora = {
        "demo": (
            shared_of(token_counts(demo, "text_tokens"), token_counts(demo, "speech_tokens"), 256),
            (1_000, 2_000),
        ),
        "LibriTTS-like, fp16": (shared_of(*libritts_like(), 1_792), (2_000, 10_000, 40_000)),
        "LibriTTS-like, 4 bits": (shared_of(*libritts_like(), 480), (2_000, 10_000, 40_000)),
    }
    rows = []
    for name, (shared, sizes) in corpora.items():
        lengths = 2 + shared.num_text + shared.num_speech
        for tokens_per_batch in sizes:
            found: dict[str, list[float]] = {"ours": [], "shuffled": [], "fixed count": []}
            for epoch in range(EPOCHS):
                plan = plan_epoch(shared, sequence, tokens_per_batch=tokens_per_batch, seed=0, epoch=epoch)
                batches = [batch for window in plan for batch in window]
                found["ours"].append(waste(batches, lengths))
                found["shuffled"].append(waste(shuffled(lengths, tokens_per_batch, epoch), lengths))
                order = np.random.default_rng(epoch).permutation(len(lengths))
                found["fixed count"].append(waste(np.array_split(order, len(batches)), lengths))
            percentages = {f"{kind} %": round(float(np.mean(values)), 2) for kind, values in found.items()}
            largest = {"ours, largest %": round(max(found["ours"]), 2)}
            shape = {"utterances": len(lengths), "mean length": round(float(lengths.mean()), 1)}
            rows.append({"corpus": name, **shape, "batch tokens": tokens_per_batch, **percentages, **largest})
    print_table(rows)
    write_result("padding", rows, settings={"epochs": EPOCHS})


if __name__ == "__main__":
    main()
