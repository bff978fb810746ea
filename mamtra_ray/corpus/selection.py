"""Which utterances of a split are used, and in which order a limit takes them.

A limit on tokens or sentences takes a random part that is spread over the speakers, not the first rows: corpora list
their speakers one after the other. A longer part begins with a shorter one.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mamtra_ray.corpus.table import first_rows_within, token_counts
from mamtra_ray.errors import InputError

_STREAM = 0x64726177


def drawn(table: pa.Table, seed: int, max_speech_tokens: int | None = None) -> pa.Table:
    """The rows in the order in which a limit takes them: one of every speaker in turn, each at random.

    Args:
        table: rows of one split; those without a speaker count as one speaker's.
        seed: of the order.
        max_speech_tokens: keep the first rows of that order that together hold at most this many speech tokens (one
            row at least); none for all.
    """
    order = np.random.default_rng([seed, _STREAM]).permutation(len(table))
    if "speaker" in table.column_names:
        speakers = pc.dictionary_encode(table["speaker"].combine_chunks(), null_encoding="encode").indices.to_numpy()
        order = order[np.argsort(_occurrences(speakers[order]), kind="stable")]
    table = table.take(order)
    if max_speech_tokens is None:
        return table
    return table.slice(0, first_rows_within(token_counts(table, "speech_tokens"), max_speech_tokens))


def _occurrences(values: np.ndarray) -> np.ndarray:
    """How often every value stood before: ``[5, 7, 5, 5]`` -> ``[0, 0, 1, 2]``."""
    by_value = np.argsort(values, kind="stable")
    ordered = values[by_value]
    is_first = np.ones(len(values), bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    starts = np.maximum.accumulate(np.where(is_first, np.arange(len(values)), 0))
    counts = np.empty(len(values), np.int64)
    counts[by_value] = np.arange(len(values)) - starts
    return counts


def fitting(table: pa.Table, split: str, overhead: int, longest: int | None) -> pa.Table:
    """The rows whose sequences the teacher was trained for: what it says beyond its longest one teaches noise.

    Args:
        table: rows of one split.
        split: named in errors.
        overhead: tokens of a sequence beside text and speech.
        longest: tokens of the teacher's longest sequence; None if it is not limited.

    Raises:
        InputError: there are none.
    """
    if longest is None:
        return table
    lengths = token_counts(table, "text_tokens") + token_counts(table, "speech_tokens") + overhead
    fits = lengths <= longest
    if not fits.any():
        raise InputError(
            f"every utterance of the split {split!r} is longer than the teacher's {longest:,} tokens (the shortest one "
            f"has {int(lengths.min()):,})"
        )
    return table.filter(pa.array(fits))


def usable(table: pa.Table, split: str, overhead: int, longest: int | None, seed: int) -> pa.Table:
    """The rows of a split that are cached and trained on, in the order in which a limit takes them.

    Raises:
        InputError: as :func:`fitting`, whose arguments these are.
    """
    return drawn(fitting(table, split, overhead, longest), seed)
