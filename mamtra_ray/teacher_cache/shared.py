"""The teacher cache in Ray's object store: read once by tasks, mapped by every process of a node without copying."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayTaskError

from mamtra_ray.errors import InputError
from mamtra_ray.teacher_cache.blocks import read_block
from mamtra_ray.teacher_cache.manifest import CacheManifest, complete_manifest
from mamtra_ray.teacher_cache.quantizer import QUANTIZER_FILE
from mamtra_ray.teacher_cache.storage import Storage

# A split up to this size is shuffled as a whole. A larger one is shuffled in windows of this size, made of
# random blocks, so that blocks that had to be spilled to disk are restored once per epoch. It must hold dozens of
# batches for their lengths to be alike (benchmarks/padding.py); all trials and workers of a node share its memory.
WINDOW_BYTES = 4 << 30
_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class SharedCache:
    """Handle of a split in the object store: small, picklable, passed to every trial.

    Attributes:
        manifest: of the cache.
        split: train or validation.
        blocks: references to Arrow tables, rows sorted by length.
        block_of_row, row_in_block: where an utterance lies, int32 (utterances,), in corpus order.
        num_text, num_speech: tokens of every utterance, int32 (utterances,).
        num_bytes: of all blocks.
        window_blocks: how many blocks one process uses at a time.
        quantizer: reference to the content of the quantizer's file, if the format has one.
    """

    manifest: CacheManifest
    split: str
    blocks: tuple[Any, ...]
    block_of_row: np.ndarray
    row_in_block: np.ndarray
    num_text: np.ndarray
    num_speech: np.ndarray
    num_bytes: int
    window_blocks: int
    quantizer: Any

    @property
    def num_utterances(self) -> int:
        return len(self.num_speech)

    @property
    def speech_tokens(self) -> int:
        return int(self.num_speech.sum())

    @property
    def labeled_positions(self) -> int:
        """Positions with a label and a teacher row: the end of speech counts too."""
        return self.speech_tokens + self.num_utterances


def share_cache(
    folder: Path | str,
    *,
    teacher_fingerprint: str,
    corpus_hash: str,
    split: str = "train",
    max_tokens: int | None = None,
) -> SharedCache:
    """Read a split of a teacher cache, checked, into the object store. Ray must be initialized.

    Args:
        folder: local path or URI of the cache.
        teacher_fingerprint, corpus_hash: what it must have been made from.
        split: train or validation.
        max_tokens: only the first utterances that together hold at most this many speech tokens.

    Raises:
        InputError: no finished cache, one of another teacher or corpus, or a damaged shard (named).
    """
    storage = Storage.of(folder)
    manifest = complete_manifest(storage, {"teacher": teacher_fingerprint, "corpus": corpus_hash})
    shards = manifest.split_shards(split)
    if not shards:
        raise InputError(f"teacher cache {storage} has no split {split!r}")
    store_bytes = min(node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["Alive"])
    window_bytes = min(WINDOW_BYTES, store_bytes / 5)
    groups = _groups(shards, min(_BLOCK_BYTES, window_bytes / 4), max_tokens)
    # A task's result survives the loss of a node (it is computed again); an object put by the driver does not.
    read = ray.remote(read_block).options(num_returns=2)
    references: list[Any] = [read.remote(storage, group, limit) for group, limit in groups]
    try:
        layouts = ray.get([layout for _, layout in references])
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, InputError) else error) from None
    num_bytes = sum(layout.num_bytes for layout in layouts)
    blocks_a_window = max(1, int(window_bytes / max(layout.num_bytes for layout in layouts)))
    return SharedCache(
        manifest=manifest,
        split=split,
        blocks=tuple(block for block, _ in references),
        block_of_row=np.repeat(np.arange(len(layouts), dtype=np.int32), [len(x.num_speech) for x in layouts]),
        row_in_block=np.concatenate([layout.row_in_block for layout in layouts]),
        num_text=np.concatenate([layout.num_text for layout in layouts]),
        num_speech=np.concatenate([layout.num_speech for layout in layouts]),
        num_bytes=num_bytes,
        window_blocks=len(layouts) if num_bytes <= window_bytes else blocks_a_window,
        quantizer=_quantizer(storage, manifest),
    )


def _quantizer(storage: Storage, manifest: CacheManifest) -> Any:
    if QUANTIZER_FILE not in manifest.files:
        return None
    content = storage.read(QUANTIZER_FILE).to_pybytes()
    if hashlib.sha256(content).hexdigest() != manifest.files[QUANTIZER_FILE]:
        raise InputError(f"{storage.child(QUANTIZER_FILE)} is damaged (its checksum differs)")
    return ray.put(content)


def _groups(
    shards: Sequence[tuple[str, Any]], block_bytes: float, max_tokens: int | None
) -> list[tuple[list[tuple[str, Any]], int | None]]:
    """Shards that become one block each, with the speech tokens that may be used of them."""
    groups: list[tuple[list[tuple[str, Any]], int | None]] = []
    size, left = 0, max_tokens
    for name, shard in shards:
        if left is not None and left <= 0:
            break
        if not groups or size + shard.num_bytes > block_bytes:
            groups.append(([], left))
            size = 0
        groups[-1][0].append((name, shard))
        size += shard.num_bytes
        left = None if left is None else left - shard.speech_tokens
    return groups
