"""A batch cut into micro batches: what one process holds at once in a training step.

Rows are padded right and every layer is causal, so a micro batch is cut at the last labeled position of its longest
row: what lies behind takes part in no loss.

Tensor letters: B utterances and L positions of a batch, b and l of a micro batch, n its labeled positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mamtra_ray.losses import IGNORE, HiddenTargets, TopKTargets
from mamtra_ray.teacher_cache.formats import to_device


class Batch(Protocol):
    """What a step needs; ``teacher_cache.batches.DistillBatch`` is one."""

    @property
    def input_ids_BL(self) -> Tensor:
        """Unified ids, padded right."""

    @property
    def labels_BL(self) -> Tensor:
        """Speech ids, or IGNORE."""

    @property
    def host_labels_BL(self) -> Tensor:
        """The same on the CPU: where to cut is known without waiting for a GPU."""

    @property
    def teacher_targets(self) -> HiddenTargets | TopKTargets:
        """The teacher's rows for the labeled positions, in the order of ``labels_BL[labels_BL != IGNORE]``."""

    @property
    def num_tokens(self) -> int:
        """Labeled positions."""

    @property
    def step_tokens(self) -> int:
        """Labeled positions of the whole step, over all processes that train together."""


@dataclass(frozen=True)
class MicroBatch:
    """Consecutive utterances of a batch."""

    input_ids_bl: Tensor
    labeled_n: Tensor
    """Labeled positions, counted through ``input_ids_bl`` row by row."""
    labels_n: Tensor
    """Speech ids there."""
    teacher_targets: HiddenTargets | TopKTargets

    @property
    def num_padded(self) -> int:
        """Tokens it holds, padding included."""
        return self.input_ids_bl.numel()

    @property
    def num_utterances(self) -> int:
        """Rows."""
        return self.input_ids_bl.shape[0]


def micro_batches(batch: Batch, most: int | None) -> list[MicroBatch]:
    """``batch`` in parts of at most ``most`` padded tokens, or of a single longer utterance; None: in one part.

    Nothing waits for the device. A batch without labels is one part too: every process takes part in every step.
    """
    is_labeled_BL = batch.host_labels_BL != IGNORE
    rows, width = is_labeled_BL.shape
    if most is None:
        cuts = [(0, rows, width)]
    else:
        last_B = (is_labeled_BL * torch.arange(1, width + 1)).amax(1).clamp_min(1)
        cuts = _cut(last_B.tolist(), most)
    counts = [0, *is_labeled_BL.sum(1).cumsum(0).tolist()]
    return [_part(batch, is_labeled_BL, counts, *cut) for cut in cuts]


def empty_part(batch: Batch) -> MicroBatch:
    """A position without a label: a pass that adds nothing to the gradient."""
    none_n = batch.labels_BL.new_empty(0)
    return MicroBatch(batch.input_ids_BL[:1, :1], none_n, none_n, batch.teacher_targets.rows(slice(0, 0)))


def _cut(lengths: list[int], most: int) -> list[tuple[int, int, int]]:
    """(first row, row after the last, positions of the longest) of every part."""
    cuts, first, longest = [], 0, 0
    for row, length in enumerate(lengths):
        if row > first and max(longest, length) * (row + 1 - first) > most:
            cuts.append((first, row, longest))
            first, longest = row, 0
        longest = max(longest, length)
    return [*cuts, (first, len(lengths), longest)]


def _part(batch: Batch, is_labeled_BL: Tensor, counts: list[int], first: int, end: int, width: int) -> MicroBatch:
    labeled_n = is_labeled_BL[first:end, :width].flatten().nonzero()[:, 0]
    labeled_n = to_device(labeled_n.numpy(), batch.labels_BL.device)
    return MicroBatch(
        input_ids_bl=batch.input_ids_BL[first:end, :width],
        labeled_n=labeled_n,
        labels_n=batch.labels_BL[first:end, :width].flatten().index_select(0, labeled_n),
        teacher_targets=batch.teacher_targets.rows(slice(counts[first], counts[end])),
    )
