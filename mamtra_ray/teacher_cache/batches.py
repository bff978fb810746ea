"""Length-bucketed batches for every training, out of the teacher cache in Ray's object store.

What a batch copies is its own rows. :func:`batches` plans an epoch from the lengths alone, so it is a pure function of
the cache, the seed and the epoch, and can start anywhere.

Tensor letters: B batch, L padded length, N labeled positions, D model width.
"""

from __future__ import annotations

import dataclasses
import functools
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray
import torch
from torch import Tensor

from mamtra_ray.errors import InputError
from mamtra_ray.losses import IGNORE, HiddenTargets, TopKTargets
from mamtra_ray.speech_lm.sequences import SequenceFormat
from mamtra_ray.teacher_cache.formats import RowFormat, row_format, to_device
from mamtra_ray.teacher_cache.manifest import NEXT_TOKEN
from mamtra_ray.teacher_cache.shared import SharedCache

# Sequence lengths within a few percent of each other count as equal: batches differ from epoch to epoch.
_LENGTH_JITTER = 0.03
_NONE = np.empty(0, np.uint8)


@dataclass(frozen=True)
class DistillBatch:
    """Right-padded sequences with the teacher's rows.

    Attributes:
        input_ids_BL: unified ids, int64; padding is 0.
        attention_mask_BL: bool, true for real tokens.
        labels_BL: speech ids, or -100.
        teacher_targets: rows in the order of ``labels_BL[labels_BL != -100]``.
        host_labels_BL: the labels on the CPU, so that nobody waits for a GPU to count them.
        num_tokens: labeled positions N.
        step_tokens: labeled positions of the whole batch, over all ranks.
        num_real: real tokens, text included.
        num_padded: B * L, so padding wastes ``1 - num_real / num_padded``.
    """

    input_ids_BL: Tensor
    attention_mask_BL: Tensor
    labels_BL: Tensor
    teacher_targets: HiddenTargets | TopKTargets
    host_labels_BL: Tensor
    num_tokens: int
    step_tokens: int
    num_real: int
    num_padded: int


def plan_epoch(
    shared: SharedCache,
    sequence: SequenceFormat,
    *,
    tokens_per_batch: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
) -> list[list[np.ndarray]]:
    """One rank's part of the batches of an epoch, as utterance indices, window by window.

    Batches do not depend on the number of ranks, which share the utterances of each. A rank has no part (an empty
    array) of a batch that has fewer utterances than there are ranks.
    """
    random = np.random.default_rng([seed, epoch, 0x6D61])
    lengths = sequence.overhead + shared.num_text + shared.num_speech
    num_blocks = len(shared.blocks)
    windows = [np.arange(num_blocks)]
    if shared.window_blocks < num_blocks:
        windows = np.array_split(random.permutation(num_blocks), -(-num_blocks // shared.window_blocks))
    plan = []
    for window in windows:
        rows = np.flatnonzero(np.isin(shared.block_of_row, window))
        sort_key = lengths[rows] * (1 + _LENGTH_JITTER * random.random(len(rows)))
        rows = rows[np.argsort(sort_key, kind="stable")]
        cut = _cut(rows, lengths, tokens_per_batch)
        # Sorted by length: taken in turns, the parts of a batch are about equally long.
        plan.append([cut[step][rank::world_size] for step in random.permutation(len(cut))])
    return plan


def batches(
    shared: SharedCache,
    sequence: SequenceFormat,
    *,
    tokens_per_batch: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
    skip_batches: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[DistillBatch]:
    """One epoch of one rank, shuffled by ``(seed, epoch)``.

    Args:
        shared: of :func:`share_cache`.
        sequence: how the teacher builds sequences.
        tokens_per_batch: padded tokens of a batch at most, over all ranks; a longer utterance is a batch of its own.
        seed, epoch: equal ones give equal batches.
        rank, world_size: this process among those that train together.
        skip_batches: leave out so many of this rank's first batches (to go on from a checkpoint).
        device: where the tensors are put; on CUDA one batch is prepared while another trains.
    """
    if tokens_per_batch < 1:
        raise InputError(f"a batch needs at least 1 token, not {tokens_per_batch}")
    device = torch.device(device)
    epoch_plan = functools.partial(
        plan_epoch, shared, sequence, tokens_per_batch=tokens_per_batch, seed=seed, epoch=epoch
    )
    plan = epoch_plan(rank=rank, world_size=world_size)
    # Every rank knows all parts, so that none asks the others how many tokens a step has.
    num_labeled = shared.num_speech + 1
    step_tokens = [[int(num_labeled[rows].sum()) for rows in window] for window in epoch_plan()]
    made = _made(shared, sequence, plan, step_tokens, skip_batches, device)
    return _prefetched(made) if device.type == "cuda" else made


def batches_holding(
    shared: SharedCache, sequence: SequenceFormat, tokens: int, *, tokens_per_batch: int, seed: int, epoch: int
) -> int:
    """How many of an epoch's first batches it takes for ``tokens`` real tokens, over all ranks."""
    lengths = sequence.overhead + shared.num_text + shared.num_speech
    plan = plan_epoch(shared, sequence, tokens_per_batch=tokens_per_batch, seed=seed, epoch=epoch)
    held = np.cumsum([int(lengths[rows].sum()) for window in plan for rows in window])
    return min(int(np.searchsorted(held, tokens)) + 1, len(held))


def padding_waste(shared: SharedCache, sequence: SequenceFormat, *, tokens_per_batch: int, seed: int = 0) -> float:
    """Share of an epoch's tokens that is padding, from the lengths alone."""
    lengths = sequence.overhead + shared.num_text + shared.num_speech
    plan = plan_epoch(shared, sequence, tokens_per_batch=tokens_per_batch, seed=seed, epoch=0)
    padded = sum(len(rows) * int(lengths[rows].max()) for window in plan for rows in window)
    return 1 - int(lengths.sum()) / padded


def _cut(rows: np.ndarray, lengths: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
    """Consecutive batches of at most ``tokens_per_batch`` padded tokens (or a single utterance)."""
    cut, first, longest = [], 0, 0
    for position, length in enumerate(lengths[rows].tolist()):
        longest = max(longest, length)
        if position > first and longest * (position + 1 - first) > tokens_per_batch:
            cut.append(rows[first:position])
            first, longest = position, length
    return [*cut, rows[first:]]


class _Column:
    """Zero-copy access to the values of a binary column of a mapped table."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
        _, offsets, data = array.buffers()
        self.offsets = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
        self.data = np.frombuffer(data, np.uint8)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.data[self.offsets[row] : self.offsets[row + 1]]


def _made(
    shared: SharedCache,
    sequence: SequenceFormat,
    plan: list[list[np.ndarray]],
    step_tokens: list[list[int]],
    skip_batches: int,
    device: torch.device,
) -> Iterator[DistillBatch]:
    rows_format = row_format(
        shared.manifest.made_by["format"],
        shared.manifest.hidden_size,
        sequence.vocabulary.speech_size,
        None if shared.quantizer is None else ray.get(shared.quantizer),
    )
    names = ("text_tokens", "speech_tokens", *rows_format.columns)
    for window, window_tokens in zip(plan, step_tokens, strict=True):
        if skip_batches >= len(window):
            skip_batches -= len(window)
            continue
        filler = next((rows[:1] for rows in window if len(rows)), np.zeros(1, np.int64))
        remaining = list(zip(window[skip_batches:], window_tokens[skip_batches:], strict=True))
        skip_batches = 0
        needed = np.unique(shared.block_of_row[np.concatenate([*(rows for rows, _ in remaining), filler])]).tolist()
        tables = ray.get([shared.blocks[block] for block in needed])
        columns = {
            block: {name: _Column(table[name]) for name in (*names, NEXT_TOKEN) if name in table.column_names}
            for block, table in zip(needed, tables, strict=True)
        }
        del tables
        for rows, tokens in remaining:
            is_empty = len(rows) == 0
            rows = filler if is_empty else rows
            places = [(columns[int(shared.block_of_row[row])], int(shared.row_in_block[row])) for row in rows]
            values = {name: [block[name][row] for block, row in places] for name in names}
            values[NEXT_TOKEN] = [block[NEXT_TOKEN][row] if NEXT_TOKEN in block else _NONE for block, row in places]
            batch = dataclasses.replace(_batch(sequence, rows_format, values, device), step_tokens=tokens)
            yield _without_content(batch) if is_empty else batch
        # Lets go of this window's blocks before the next one's are restored.
        del columns


def _batch(
    sequence: SequenceFormat, rows_format: RowFormat, values: dict[str, list[np.ndarray]], device: torch.device
) -> DistillBatch:
    """Equal to padding ``sequence.training_example`` of each row, without Python loops over tokens."""
    texts = [value.view("<i4") for value in values["text_tokens"]]
    speeches = [value.view("<i4") for value in values["speech_tokens"]]
    prefix, separator = np.array(sequence.prefix, np.int64), np.array(sequence.separator, np.int64)
    lengths = np.array(
        [sequence.overhead + len(text) + len(speech) for text, speech in zip(texts, speeches, strict=True)]
    )
    shape = (len(lengths), int(lengths.max()))
    input_ids_BL = np.zeros(shape, np.int64)
    labels_BL = np.full(shape, IGNORE, np.int64)
    following = [value.view("<i4") for value in values[NEXT_TOKEN]]
    for ids, labels, text, speech, after in zip(input_ids_BL, labels_BL, texts, speeches, following, strict=True):
        speech_start = sequence.overhead + len(text)
        ids[: len(prefix)] = prefix
        ids[len(prefix) : len(prefix) + len(text)] = text
        ids[len(prefix) + len(text) : speech_start] = separator
        ids[speech_start : speech_start + len(speech)] = speech + sequence.vocabulary.speech_offset
        labels[speech_start - 1 : speech_start - 1 + len(speech)] = speech
        labels[speech_start - 1 + len(speech)] = after[0] if len(after) else sequence.vocabulary.eos_id
    mask_BL = np.arange(shape[1])[None, :] < lengths[:, None]
    num_tokens = sum(len(speech) + 1 for speech in speeches)
    return DistillBatch(
        input_ids_BL=to_device(input_ids_BL, device),
        attention_mask_BL=to_device(mask_BL, device),
        labels_BL=to_device(labels_BL, device),
        teacher_targets=rows_format.decode({name: values[name] for name in rows_format.columns}, speeches, device),
        host_labels_BL=torch.from_numpy(labels_BL),
        num_tokens=num_tokens,
        step_tokens=num_tokens,
        num_real=int(lengths.sum()),
        num_padded=shape[0] * shape[1],
    )


def _without_content(batch: DistillBatch) -> DistillBatch:
    """What a rank computes that has no part of a batch: all ranks must take part in every step."""
    return dataclasses.replace(
        batch,
        attention_mask_BL=torch.zeros_like(batch.attention_mask_BL),
        labels_BL=torch.full_like(batch.labels_BL, IGNORE),
        host_labels_BL=torch.full_like(batch.host_labels_BL, IGNORE),
        teacher_targets=batch.teacher_targets.rows(slice(0)),
        num_tokens=0,
        num_real=0,
    )


def _prefetched(made: Iterator[DistillBatch], ahead: int = 2) -> Iterator[DistillBatch]:
    """The same batches, prepared by a thread; the training step of a GPU leaves the CPU free for it."""
    ready: queue.Queue[DistillBatch | BaseException | None] = queue.Queue(ahead)
    stopped = threading.Event()

    def put(item: DistillBatch | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for batch in made:
                put(batch)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    threading.Thread(target=produce, daemon=True).start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
