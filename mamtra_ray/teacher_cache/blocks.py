"""The Ray task that reads shards of a teacher cache into one block of the object store.

A module of its own without torch, because a worker process imports it just to read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mamtra_ray.corpus.table import first_rows_within
from mamtra_ray.teacher_cache.manifest import Shard, read_shard
from mamtra_ray.teacher_cache.storage import Storage


@dataclass(frozen=True)
class BlockLayout:
    """Where a block's utterances lie; all arrays are int32 and in corpus order."""

    row_in_block: np.ndarray
    num_text: np.ndarray
    num_speech: np.ndarray
    num_bytes: int


def read_block(
    storage: Storage, shards: Sequence[tuple[str, Shard]], max_tokens: int | None
) -> tuple[pa.Table, BlockLayout]:
    """Read and check shards, keep the first ``max_tokens`` speech tokens, sort the rows by length.

    Raises:
        InputError: names a missing, truncated or damaged shard.
    """
    table = pa.concat_tables([read_shard(storage, name, shard) for name, shard in shards])
    num_speech = table["num_speech"].to_numpy()
    if max_tokens is not None:
        table = table.slice(0, first_rows_within(num_speech, max_tokens))
    num_text, num_speech = table["num_text"].to_numpy(), table["num_speech"].to_numpy()
    order = np.argsort(num_text + num_speech, kind="stable")
    row_in_block = np.empty(len(order), np.int32)
    row_in_block[order] = np.arange(len(order))
    # Taking the rows also makes every column one chunk, which readers map without copying.
    table = table.combine_chunks().take(order).combine_chunks()
    return table, BlockLayout(row_in_block, num_text.copy(), num_speech.copy(), table.nbytes)
